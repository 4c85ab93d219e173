"""`make lint`: style, types and import contracts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools.host import ROOT, link_root

_PYTHON = (sys.executable, "-m")

CHECKS: dict[str, tuple[str, ...]] = {
    "style": (*_PYTHON, "ruff", "check", "--output-format", "concise", "."),
    "format": (*_PYTHON, "ruff", "format", "--check", "--output-format", "concise", "."),
    "types": (*_PYTHON, "mypy", "d2m_model", "d2m_train", "demo", "benchmarks", "tools"),
    "types of the nodes": (*_PYTHON, "mypy", "-p", "dense2moe.nodes"),
    "import contracts": (
        *(sys.executable, "-c"),
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
    ),
}


def check(name: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one of CHECKS on the pack at `root`.

    In ComfyUI the root is the nodes' package, so they import relatively beyond their own folder. A link to the
    root, called dense2moe, gives type checker and import contracts a name for that package.
    """
    link_root(root, root / ".host" / "package", "dense2moe")
    package = str(root / ".host" / "package")
    environ = {**os.environ, "PYTHONPATH": package, "MYPYPATH": package}
    return subprocess.run(CHECKS[name], cwd=root, env=environ, capture_output=True, text=True)


def main() -> int:
    """Run every check and print what the failed ones reported."""
    failed = []
    for name in CHECKS:
        done = check(name)
        if done.returncode:
            failed.append(name)
            print(f"── {name}\n{done.stdout}{done.stderr}")
    print("Failed: " + ", ".join(failed) if failed else "Passed: " + ", ".join(CHECKS))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

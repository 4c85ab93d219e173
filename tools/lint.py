"""`make lint`: style, types and import contracts."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.host import ROOT, link_root

_PYTHON = (sys.executable, "-m")

CHECKS: dict[str, tuple[str, ...]] = {
    "style": (*_PYTHON, "ruff", "check", "--output-format", "concise", "."),
    "format": (*_PYTHON, "ruff", "format", "--check", "--output-format", "concise", "."),
    "types": (*_PYTHON, "mypy", "d2m_model", "d2m_train", "demo", "benchmarks", "tools"),
    "types of the nodes": (*_PYTHON, "mypy", "--cache-dir", ".mypy_cache/nodes", "-p", "dense2moe.nodes"),
    "import contracts": (
        *(sys.executable, "-c"),
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
    ),
}


def check(name: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one of CHECKS on the pack at `root`."""
    return _run(name, root, _environment(root))


def _environment(root: Path) -> dict[str, str]:
    """Return the environment of type checker and import contracts, with a link to the root that is called dense2moe.

    In ComfyUI the root is the nodes' package, so they import relatively beyond their own folder; the link gives that
    package a name.
    """
    link_root(root, root / ".host" / "package", "dense2moe")
    package = str(root / ".host" / "package")
    return {**os.environ, "PYTHONPATH": package, "MYPYPATH": package}


def _run(name: str, root: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(CHECKS[name], cwd=root, env=environ, capture_output=True, text=True)


def main() -> int:
    """Run all checks, side by side, and print what the failed ones reported."""
    environ = _environment(ROOT)
    with ThreadPoolExecutor() as pool:
        results = dict(zip(CHECKS, pool.map(lambda name: _run(name, ROOT, environ), CHECKS), strict=True))
    failed = [name for name, done in results.items() if done.returncode]
    for name in failed:
        print(f"── {name}\n{results[name].stdout}{results[name].stderr}")
    print("Failed: " + ", ".join(failed) if failed else "Passed: " + ", ".join(CHECKS))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

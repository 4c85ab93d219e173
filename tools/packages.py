"""Install the packages of the environment whose Python runs this.

`ENVIRONMENT/bin/python -m tools.packages [HOST_REQUIREMENTS]` installs the requirements of pyproject.toml and,
if given, those of a ComfyUI, at the versions that constraints.txt pins. The project itself is not installed: it
runs from its folder, as in ComfyUI, where an import that only an installed copy satisfies would fail.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

EXTRAS = ("train", "dev")


def requirements(root: Path, extras: tuple[str, ...] = EXTRAS) -> list[str]:
    """Return the requirements in pyproject.toml, with `extras` (by default those that development needs)."""
    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def constraints(root: Path, host_requirements: Path | None = None) -> str:
    """Return the pins of constraints.txt without those that the host's requirements.txt sets itself.

    constraints.txt is made for the default host; other hosts pin another frontend and other templates.
    """
    pins = (root / "constraints.txt").read_text(encoding="utf-8")
    if host_requirements is None:
        return pins
    host_pins = re.compile(r"^([\w.-]+)\s*==", flags=re.MULTILINE)
    left_out = {_canonical(name) for name in host_pins.findall(host_requirements.read_text(encoding="utf-8"))}

    def is_ours(line: str) -> bool:
        name = _canonical(re.split(r"[=;\s]", line, maxsplit=1)[0])
        # comfyui-workflow-templates pins its own parts.
        return name not in left_out and not name.startswith("comfyui-workflow-templates-")

    return "\n".join(filter(is_ours, pins.splitlines())) + "\n"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def install_packages(root: Path, host_requirements: Path | None = None) -> bool:
    """Install the required packages at their pinned versions, with uv or else with pip; False if both fail."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as pins:
        pins.write(constraints(root, host_requirements))
        pins.flush()
        wanted = ["--constraint", pins.name, *requirements(root)]
        if host_requirements:
            wanted += ["--requirement", str(host_requirements)]
        pip = ["pip", "install", "--disable-pip-version-check"]
        if _run(*pip, "--quiet", "--constraint", pins.name, "uv"):
            if _run("uv", "pip", "install", "--python", sys.executable, *wanted):
                return True
            print("uv did not succeed; trying pip, which may know your package index.", file=sys.stderr)
        return _run(*pip, *wanted)


def _run(module: str, *arguments: str) -> bool:
    """Run a module of the environment with its output on stderr, since a program may read the caller's stdout."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode == 0


if __name__ == "__main__":
    sys.exit(0 if install_packages(Path.cwd(), *map(Path, sys.argv[1:])) else 1)

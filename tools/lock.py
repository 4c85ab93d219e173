"""Pin the newest packages that the project, its extras and the default host require, in constraints.txt.

Run `python -m tools.lock [FILE]` with the environment that `make setup` makes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.host import ROOT, host_in_use
from tools.packages import EXTRAS

_OLDEST_PYTHON = "3.10"


def lock(target: Path) -> int:
    """Write the pins for all platforms and Pythons to `target`; return uv's exit status."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--upgrade", "--universal", "--no-annotate", "--quiet"]
    command += [
        "--python-version",
        _OLDEST_PYTHON,
        "--custom-compile-command",
        "make lock",
        "--output-file",
        str(target),
    ]
    for extra in EXTRAS:
        command += ["--extra", extra]
    command += [str(ROOT / "pyproject.toml"), str(host_in_use().requirements)]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(lock(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "constraints.txt"))

"""Pin in constraints.txt the newest packages that this project, with its extras, and the default host ask for.

`python -m tools.lock [FILE]`, run by the environment that `make setup` has made.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.host import ROOT, host_in_use
from tools.packages import EXTRAS

OLDEST_PYTHON = "3.10"


def lock(target: Path) -> int:
    """Write the pins of all platforms and Pythons to `target`; the exit status of uv."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--upgrade", "--universal", "--no-annotate", "--quiet"]
    command += [
        "--python-version",
        OLDEST_PYTHON,
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

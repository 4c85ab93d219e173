"""The virtual environment: making it, filling it, and knowing whether it is up to date."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tools.errors import SetupError
from tools.host import Host

OLDEST_PYTHON = (3, 10)
# Raise it when set-up itself changes so that an environment made by an older one must be gone over again.
SCHEMA = "1"


def digest(root: Path, host: Host) -> str:
    """What an environment must have been made from to be up to date."""
    inputs = (root / "pyproject.toml", root / "constraints.txt", host.requirements)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs]
    return " ".join([SCHEMA, *sums])


def stamp(venv: Path) -> Path:
    """The file that holds the digest of a finished environment."""
    return venv / "setup-complete"


def is_current(root: Path, host: Host) -> bool:
    """Whether the environment stands as these inputs ask. Cheap: reads a few small files."""
    done = stamp(host.venv)
    return host.python.exists() and done.is_file() and done.read_text() == digest(root, host)


def create(venv: Path) -> None:
    """Make sure of a virtual environment with pip; one whose Python works is completed, never recreated."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SetupError(
            f"This is Python {sys.version.split()[0]}; set-up needs {'.'.join(map(str, OLDEST_PYTHON))} or newer.\n"
            "What to do: `make setup PYTHON=python3.11`, with a Python that you have."
        )
    python = venv / "bin" / "python"
    if _runs(python, "import pip"):
        return
    print(f"Making the virtual environment {venv.name} …", file=sys.stderr)
    command = [sys.executable, "-m", "venv", str(venv)]
    if not _runs(python, f"import sys; assert sys.version_info >= {OLDEST_PYTHON}"):
        command.append("--clear")
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        raise SetupError(
            f"Python could not make the virtual environment {venv}.\n"
            "What to do: see the message above; on Debian and Ubuntu, `apt-get install python3-venv`."
        )


def _runs(python: Path, code: str) -> bool:
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def fill(root: Path, host: Host) -> None:
    """Bring the packages of the environment to what the project and the host ask for."""
    print("Installing packages (the first time several GB, most of it PyTorch) …", file=sys.stderr)
    command = [str(host.python), "-m", "tools.packages", str(host.requirements)]
    if subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        raise SetupError(
            "Not all Python packages could be installed; the message above says which.\n"
            "What to do: check the network, proxy and free disk space (about 8 GB), then run `make setup` again:\n"
            "it goes on where it stopped."
        )


def mark_complete(root: Path, host: Host) -> None:
    """Write the stamp, whole or not at all; the last act of a set-up."""
    unfinished = stamp(host.venv).with_suffix(".tmp")
    unfinished.write_text(digest(root, host))
    unfinished.replace(stamp(host.venv))

"""The virtual environment: making it, filling it, and knowing whether it is up to date."""

from __future__ import annotations

import csv
import hashlib
import shutil
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
    for info in incomplete(venv):
        print("Incomplete, to be installed again:", info.name.removesuffix(".dist-info"), file=sys.stderr)
        shutil.rmtree(info)  # without it the package counts as not installed
    python = venv / "bin" / "python"
    if _runs(python, "from importlib.metadata import version; version('pip')"):
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


def incomplete(venv: Path) -> list[Path]:
    """The dist-info folders of packages that an interrupted installation left incomplete.

    Their RECORD is missing, or names a file that is missing or has another size.
    """
    infos = sorted(venv.glob("lib/python3*/site-packages/*.dist-info"))
    return [info for info in infos if not _is_complete(info)]


def _is_complete(info: Path) -> bool:
    record = info / "RECORD"
    if not record.is_file() or not (info / "METADATA").is_file():
        return False
    with record.open(newline="", encoding="utf-8") as rows:
        for name, _hash, size in csv.reader(rows):
            if name.endswith(".pyc"):
                continue
            try:
                found = (info.parent / name).stat().st_size
            except OSError:
                return False
            if size and found != int(size):
                return False
    return True


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

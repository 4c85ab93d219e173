"""Make the virtual environment, install its packages, and check whether it is up to date."""

from __future__ import annotations

import csv
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tools.errors import SetupError

_OLDEST_PYTHON = (3, 10)
# Raise it when set-up itself changes, so that environments made by an older one are completed.
_SCHEMA = "1"


def inputs_digest(root: Path, host_requirements: Path | None = None) -> str:
    """Digest of everything that an environment is made from; the packages of a ComfyUI come last."""
    inputs = [root / "pyproject.toml", root / "constraints.txt", *([host_requirements] if host_requirements else [])]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs]
    return " ".join([_SCHEMA, *sums])


def stamp(venv: Path) -> Path:
    """The file that holds the digest of a finished environment."""
    return venv / "setup-complete"


def is_current(root: Path, venv: Path, host_requirements: Path | None = None) -> bool:
    """Return True if the environment is up to date. Reads only a few small files.

    Without `host_requirements`, an environment that also has the packages of a ComfyUI is up to date too.
    """
    done = stamp(venv)
    if not python_in(venv).exists() or not done.is_file():
        return False
    finished, wanted = done.read_text(), inputs_digest(root, host_requirements)
    return finished == wanted or (host_requirements is None and finished.startswith(f"{wanted} "))


def python_in(venv: Path) -> Path:
    """The Python of a virtual environment."""
    return venv / "bin" / "python"


def create(venv: Path) -> None:
    """Make a virtual environment with pip, or complete one whose Python works; it is never recreated then."""
    if sys.version_info[:2] < _OLDEST_PYTHON:
        raise SetupError(
            f"This is Python {sys.version.split()[0]}; set-up needs {'.'.join(map(str, _OLDEST_PYTHON))} or newer.\n"
            "What to do: `make setup PYTHON=python3.11`, with a Python that you have."
        )
    for info in _incomplete_packages(venv):
        print("Incomplete, to be installed again:", info.name.removesuffix(".dist-info"), file=sys.stderr)
        shutil.rmtree(info)  # without it the package counts as not installed
    python = python_in(venv)
    if _runs(python, "from importlib.metadata import version; version('pip')"):
        return
    print(f"Making the virtual environment {venv.name} …", file=sys.stderr)
    command = [sys.executable, "-m", "venv", str(venv)]
    if not _runs(python, f"import sys; assert sys.version_info >= {_OLDEST_PYTHON}"):
        command.append("--clear")
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        raise SetupError(
            f"Python could not make the virtual environment {venv}.\n"
            "What to do: see the message above; on Debian and Ubuntu, `apt-get install python3-venv`."
        )


def _incomplete_packages(venv: Path) -> list[Path]:
    """Return the dist-info folders of packages that an interrupted installation left incomplete.

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
                size_on_disk = (info.parent / name).stat().st_size
            except OSError:
                return False
            if size and size_on_disk != int(size):
                return False
    return True


def _runs(python: Path, code: str) -> bool:
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def fill_environment(root: Path, venv: Path, host_requirements: Path | None = None) -> None:
    """Install the packages that the project and, if given, a ComfyUI require."""
    print("Installing packages (the first time several GB, most of it PyTorch) …", file=sys.stderr)
    command = [str(python_in(venv)), "-m", "tools.packages", *([str(host_requirements)] if host_requirements else [])]
    if subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        raise SetupError(
            "Not all Python packages could be installed; the message above says which.\n"
            "What to do: check the network, proxy and free disk space (about 8 GB), then run `make setup` again;\n"
            "it continues where it stopped."
        )


def mark_complete(root: Path, venv: Path, host_requirements: Path | None = None) -> None:
    """Write the stamp atomically, as the last step of a set-up."""
    unfinished = stamp(venv).with_suffix(".tmp")
    unfinished.write_text(inputs_digest(root, host_requirements))
    unfinished.replace(stamp(venv))

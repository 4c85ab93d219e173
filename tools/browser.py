"""The Chromium that the browser tests drive.

`make setup` looks for one and, as root on Debian, installs Debian's. Set-up succeeds without one.
`python -m tools.browser` tries again and prints its path.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tools.errors import SetupError
from tools.host import ROOT

_COMMANDS = (
    "chromium",
    "google-chrome",
    "google-chrome-stable",
    "microsoft-edge",
    "chromium-browser",
    "msedge",
    "chrome",
)
MAC_PLACES = tuple(
    Path(f"/Applications/{name}.app/Contents/MacOS/{name}") for name in ("Google Chrome", "Chromium", "Microsoft Edge")
)
WINDOWS_ROOTS = ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
WINDOWS_PLACES = ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")
_PLAYWRIGHTS = {  # by system: playwright's folder of downloaded browsers, and their program in it
    "Linux": (".cache/ms-playwright", "chromium-*/chrome-linux*/chrome"),
    "Darwin": (
        "Library/Caches/ms-playwright",
        "chromium-*/chrome-mac*/Google Chrome for Testing.app/Contents/MacOS/Google Chrome for Testing",
    ),
    "Windows": ("AppData/Local/ms-playwright", "chromium-*/chrome-win*/chrome.exe"),
}
OS_RELEASE = Path("/etc/os-release")
_MISSING = (
    "The browser tests need a Chromium, but none is installed.\n"
    "What to do, one of these:\n"
    "  as root on Debian: `apt-get update && apt-get install chromium`\n"
    "  install Google Chrome, Chromium or Microsoft Edge\n"
    "  `.venv/bin/python -m playwright install --with-deps chromium`\n"
    "  set CHROMIUM_PATH to the program of one that is installed elsewhere"
)


def find(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> Path | None:
    """Return the program of a Chromium, or None. Raises SetupError if CHROMIUM_PATH names no file."""
    if own := environ.get("CHROMIUM_PATH"):
        path = Path(own).expanduser()
        if not path.is_file():
            raise SetupError(
                f"CHROMIUM_PATH is {own}, but there is no such file.\n"
                "What to do: point it at the program of a Chromium, Chrome or Edge, or unset it."
            )
        return path
    return next((path for path in _candidates(environ, home or Path.home()) if path.is_file()), None)


def _candidates(environ: Mapping[str, str], home: Path) -> Iterator[Path]:
    for command in _COMMANDS:
        program = shutil.which(command, path=environ.get("PATH", os.defpath))
        # Ubuntu's chromium-browser is a script that requires a snap.
        if program and not (command == "chromium-browser" and b"snap install" in Path(program).read_bytes()[:10_000]):
            yield Path(program)
    yield from MAC_PLACES
    for root in filter(None, map(environ.get, WINDOWS_ROOTS)):
        yield from (Path(root, place) for place in WINDOWS_PLACES)
    folder, pattern = _PLAYWRIGHTS.get(platform.system(), _PLAYWRIGHTS["Linux"])
    yield from sorted(Path(environ.get("PLAYWRIGHT_BROWSERS_PATH") or home / folder).glob(pattern), reverse=True)


def needed() -> Path:
    """Return the program of a Chromium. Raises SetupError with what to install if there is none."""
    if (program := find()) is None:
        raise SetupError(_MISSING)
    return program


def _install() -> bool:
    """Install Debian's Chromium; return False where that is not possible or fails."""
    if not _may_install():
        return False
    print("Installing Debian's Chromium for the browser tests …", file=sys.stderr)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "--quiet"], ["install", "--quiet", "--yes", "--no-install-recommends", "chromium"]):
        command = ["apt-get", *arguments]
        if subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
            return False
    return find() is not None


def _may_install() -> bool:
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("apt-get") or not OS_RELEASE.is_file():
        return False
    entries = (line.partition("=") for line in OS_RELEASE.read_text().splitlines())
    release = {key: value.strip('"') for key, _, value in entries}
    return release.get("ID") == "debian" or "debian" in release.get("ID_LIKE", "").split()


def ensure_chromium(root: Path) -> bool:
    """Install a Chromium if there is none. A failure is reported and remembered, so that later set-ups stay fast."""
    tried = root / ".host" / "chromium-tried"
    if find() is not None:
        return True
    if tried.exists():
        return False
    if _install():
        return True
    tried.parent.mkdir(exist_ok=True)
    tried.touch()
    print(_MISSING, file=sys.stderr)
    return False


def main() -> int:
    """Find or install a Chromium, whatever was tried before; print its path."""
    try:
        (ROOT / ".host" / "chromium-tried").unlink(missing_ok=True)
        ensure_chromium(ROOT)
        print(needed())
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make setup`: a virtual environment, pinned packages, a ComfyUI and, if there is none, a Chromium.

`python -m tools.setup --without-host` installs only what lint and the tests in tests/unit and tests/train need.
Running it again is fast when nothing has changed, and repairs what an interrupted run left.
Simultaneous runs wait for each other. All messages go to stderr.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools import browser, environment, host
from tools.errors import SetupError


def set_up(root: Path, wanted: host.Host) -> bool:
    """Bring host and environment up to date; return False when there was nothing to do."""
    if _is_set_up(root, wanted):
        return False
    with _locked(root):
        if _is_set_up(root, wanted):  # another run did it while this one waited
            return False
        environment.stamp(wanted.venv).unlink(missing_ok=True)
        environment.create(wanted.venv)
        if wanted.release:
            host.fetch(root, wanted.release, wanted.python)
        host.link_pack(root)
        environment.fill_environment(root, wanted.venv, wanted.requirements)
        environment.mark_complete(root, wanted.venv, wanted.requirements)
    return True


def set_up_without_host(root: Path, venv: Path) -> bool:
    """Bring an environment up to date for work without a ComfyUI; return False when there was nothing to do."""
    if environment.is_current(root, venv):
        return False
    with _locked(root):
        if environment.is_current(root, venv):
            return False
        environment.stamp(venv).unlink(missing_ok=True)
        environment.create(venv)
        environment.fill_environment(root, venv)
        environment.mark_complete(root, venv)
    return True


def _is_set_up(root: Path, wanted: host.Host) -> bool:
    return host.is_ready(root, wanted) and environment.is_current(root, wanted.venv, wanted.requirements)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the set-up lock; the system releases it however the process ends."""
    path = root / ".host" / "lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is running; waiting for it …", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Set up for the host in use."""
    parser = argparse.ArgumentParser(prog="python -m tools.setup", description=main.__doc__)
    parser.add_argument("--without-host", action="store_true", help="do without a ComfyUI and a Chromium")
    options = parser.parse_args()
    try:
        wanted = host.host_in_use()
        if options.without_host:
            set_up_without_host(host.ROOT, wanted.venv)
            return 0
        if set_up(host.ROOT, wanted):
            print(f"Ready: {wanted.venv.name}, ComfyUI at {wanted.path}", file=sys.stderr)
        browser.ensure_chromium(host.ROOT)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make setup`: a virtual environment, pinned packages and a ComfyUI, in the project's folder; a Chromium if need be.

Running it again costs next to nothing when nothing has changed, and heals what an interrupted run left.
Runs at the same time wait for each other. Everything is said on stderr.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools import browser, environment, host
from tools.errors import SetupError


def prepare(root: Path, wanted: host.Host) -> bool:
    """Bring host and environment to what the project asks for; False when there was nothing to do."""
    if _is_prepared(root, wanted):
        return False
    with _alone(root):
        if _is_prepared(root, wanted):  # another run did it while this one waited
            return False
        environment.stamp(wanted.venv).unlink(missing_ok=True)
        environment.create(wanted.venv)
        if wanted.release:
            host.fetch(root, wanted.release, wanted.python)
        host.link_pack(root)
        environment.fill(root, wanted)
        environment.mark_complete(root, wanted)
    return True


def _is_prepared(root: Path, wanted: host.Host) -> bool:
    return host.is_ready(root, wanted) and environment.is_current(root, wanted)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the set-up lock; the system lets go of it however the process ends."""
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
    try:
        wanted = host.host_in_use()
        if prepare(host.ROOT, wanted):
            print(f"Ready: {wanted.venv.name}, ComfyUI at {wanted.path}", file=sys.stderr)
        browser.prepare(host.ROOT)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

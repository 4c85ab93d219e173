"""The lock of a run's folder: two runs in it would write the same checkpoints and lose each other's log."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FILE = "run.lock"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it for this process, until the `with` or the process ends, however it ends.

    Raises UserError if another process has it, naming process and host, or if it cannot be written to. The file that is
    locked stays. A file system without locks, and Windows, lock nothing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _FILE).open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); name another output_dir.") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise UserError(
                    f"{folder}: {holder} is running this run. Wait for it or stop it, or name another output_dir."
                ) from None
            except OSError:
                pass
        with suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield

"""Atomic writing of files: a crash leaves the old file or none, never half of the new one."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


_YOUNG = 60  # seconds
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of network shares and virtual disks without the operation


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty temporary file in the folder of `path`, to be overwritten in place.

    At the end of the `with`, its bytes are synced to disk and it replaces `path`; after an exception it is removed.
    Its name ends in `.part`, so a library that chooses a format by the suffix must be told the format.
    """
    part = PartFile(path)
    try:
        yield part.path
        part.commit()
    finally:
        part.discard()


class PartFile:
    """A temporary file beside its target, whose name it takes in `commit`. End every use with `discard`.

    The file stays open and locked, so that other processes can tell it from one that a killed process left behind.
    Leftovers of the same target are removed. A file that is replaced keeps its mode. Raises OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = Path(os.path.realpath(path))
        self.path = self.target.with_name(f".{self.target.name}.{os.getpid()}.part")
        remove_leftovers(self.target)
        self.file = FileIO(self.path, "x")
        _lock(self.file)

    def commit(self) -> None:
        """Sync the file to disk and let it replace the target."""
        with suppress(OSError):  # there is none to replace, or a file system without modes
            os.chmod(self.path, stat.S_IMODE(self.target.stat().st_mode))
        sync_file(self.file.fileno())
        self.file.close()
        os.replace(self.path, self.target)
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Close and remove the file; does nothing after `commit`."""
        self.file.close()
        self.path.unlink(missing_ok=True)


def sync_file(descriptor: int) -> None:
    """Make an open file's bytes durable, where its file system can. Raises OSError if they could not be written."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` durable, where its file system can: the files are complete without."""
    if os.name == "posix":  # Windows has no such operation
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _lock(file: FileIO) -> None:
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(target: Path) -> None:
    """Delete what killed processes left of this target."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        if re.fullmatch(r"\d+", part.name[len(target.name) + 2 : -len(".part")]):
            _remove_unlocked(part)


def remove_leftovers_like(target: Path) -> None:
    """Delete what killed processes left of any target with this one's suffix, in its folder.

    A part file is not locked in its first moment, so young ones of other targets stay.
    """
    name = re.compile(rf"\..+{re.escape(target.suffix)}\.\d+\.part")
    for part in target.parent.glob(f".*{glob.escape(target.suffix)}.*.part"):
        with suppress(OSError):
            if name.fullmatch(part.name) and part.stat().st_mtime < time.time() - _YOUNG:
                _remove_unlocked(part)


def _remove_unlocked(part: Path) -> None:
    """Delete a part file that no process writes. Windows refuses to delete a file that is still open."""
    with suppress(OSError):
        with open(part, "rb") as file:
            if fcntl is not None:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()

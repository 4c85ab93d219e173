"""Atomic writing of files and folders: a crash leaves the old one or none, never half of the new one."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
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


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder, which takes the name `path` at the end of the `with`, in place of a folder there.

    After an exception it is removed. The old folder is renamed before it is deleted, so that a crash leaves one of the two
    whole, or, between two renames, none of them. Leftovers are told and removed as those of files are.
    """
    target = Path(os.path.realpath(path))
    old = target.with_name(f"{target.name}.old")
    for folder in (target, old):
        remove_leftovers(folder)
    part, descriptor = _part_of(target), None
    part.mkdir()
    try:
        if fcntl is not None:
            descriptor = os.open(part, os.O_RDONLY)
            _lock(descriptor)
        yield part
        if target.is_dir():
            os.rename(target, _part_of(old))
        os.rename(part, target)
        sync_folder(target.parent)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        for folder in (part, _part_of(old)):
            shutil.rmtree(folder, ignore_errors=True)


class PartFile:
    """A temporary file beside its target, whose name it takes in `commit`. End every use with `discard`.

    The file stays open and locked, so that other processes can tell it from one that a killed process left behind.
    Leftovers of the same target are removed. A file that is replaced keeps its mode. Raises OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = Path(os.path.realpath(path))
        self.path = _part_of(self.target)
        remove_leftovers(self.target)
        self.file = FileIO(self.path, "x")
        _lock(self.file.fileno())

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


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
    """Delete a part file or folder that no process writes. Windows refuses to delete a file that is still open."""
    with suppress(OSError):
        if fcntl is not None:
            descriptor = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(descriptor)
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()

"""Hash of a teacher, computed while a conversion reads it: of its files, or of tensors in memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ..tensor_file import CheckpointError

_CHUNK = 4 << 20  # bytes
_LEAD = 512 << 20  # bytes


class Digest(Protocol):
    """A hash of everything that is read.

    `reach` is called before reading up to a position, `take` with each tensor that was read, `result` at the end.
    """

    def reach(self, position: int) -> None: ...
    def take(self, name: str, tensor: Tensor) -> None: ...
    def result(self) -> str: ...


class TensorDigest:
    """sha256 of tensors in the order in which they are read: name, dtype, shape and bytes of each."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def reach(self, position: int) -> None:
        pass

    def take(self, name: str, tensor: Tensor) -> None:
        self._digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        self._digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def result(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> TensorDigest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PacedDigest:
    """sha256 of concatenated files, on a thread that reads them at the same pace as the caller.

    Neither gets more than _LEAD ahead of the other, so that both read from the disk only once. Use it in a `with`.
    `reach` and `result` raise CheckpointError for a file that cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._digest = hashlib.sha256()
        self._moved = threading.Condition()
        self.hashed = self._reached = 0  # bytes
        self._wanted = self._working = True
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)
        self._thread.start()

    def reach(self, position: int) -> None:
        """Announce that the caller will read up to `position`. Waits until the thread is near."""
        with self._moved:
            self._reached = max(self._reached, position)
            self._moved.notify_all()
            self._moved.wait_for(lambda: self.hashed + _LEAD >= position or not self._working)
            self._check()

    def take(self, name: str, tensor: Tensor) -> None:
        """Do nothing: the thread hashes the files."""

    def result(self) -> str:
        """Wait for the hash of all files and return it in hexadecimal."""
        with self._moved:
            self._reached = 1 << 63
            self._moved.notify_all()
        self._thread.join()
        self._check()
        return self._digest.hexdigest()

    def _check(self) -> None:
        if self._error is not None:
            error = self._error
            raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror or error}).") from None

    def _run(self) -> None:
        try:
            buffer = memoryview(bytearray(_CHUNK))
            for path in self._files:
                with open(path, "rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        self._digest.update(buffer[:count])
                        if not self._go_on(count):
                            return
        except OSError as error:
            error.filename = error.filename or str(path)
            self._error = error
        finally:
            with self._moved:
                self._working = False
                self._moved.notify_all()

    def _go_on(self, count: int) -> bool:
        with self._moved:
            self.hashed += count
            self._moved.notify_all()
            self._moved.wait_for(lambda: self.hashed <= self._reached + _LEAD or not self._wanted)
            return self._wanted

    def __enter__(self) -> PacedDigest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._moved:
            self._wanted = False
            self._moved.notify_all()
        self._thread.join()

"""Writing a safetensors file tensor by tensor and atomically, in memory that does not grow with the file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .atomic import PartFile, remove_leftovers, remove_leftovers_like, sync_file
from .tensor_file import ALIGNMENT, DTYPES, CheckpointError, Shape, bytes_of

_SYNC_EVERY = 256 << 20  # bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorWriter:
    """A safetensors file being written. Every tensor's position is fixed from the start; tensors may come in any order.

    Tensors whose size is a multiple of ALIGNMENT come first, the others follow by decreasing element size, so that every
    tensor is aligned to its elements and all large ones to ALIGNMENT. Otherwise the given order is kept.

    The bytes go to a temporary file that replaces the target in `finish`: a crash leaves the old file or none. Use it in
    a `with`, which removes the temporary file unless `finish` was called. Leftovers of killed processes are removed.
    Raises CheckpointError for a folder that cannot be written to or a full disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[torch.dtype, Shape]],
        metadata: Mapping[str, str],
    ) -> None:
        self._target = Path(os.path.realpath(path))
        rank = {name: (bytes_of(*spec) % ALIGNMENT != 0, -spec[0].itemsize) for name, spec in tensors.items()}
        self._specs = {name: tensors[name] for name in sorted(tensors, key=rank.__getitem__)}
        header = _header(self._specs, metadata)
        self._offsets: dict[str, int] = {}
        end = self._header_size = len(header)
        for name, spec in self._specs.items():
            self._offsets[name] = end
            end += bytes_of(*spec)
        self.size = end  # of the whole file
        self.names = tuple(self._specs)  # in the order of the file
        self._missing = set(self._specs)
        self._undo = ExitStack()
        self._unsynced = 0  # bytes
        self._syncing: Future[None] | None = None
        remove_leftovers(self._target)  # their space becomes free
        remove_leftovers_like(self._target)  # a conversion that was killed may have had another name
        _check_space(self._target, self.size)
        with self._reporting():
            self._part = PartFile(self._target)
            self._undo.callback(self._part.discard)
            self._pool = self._undo.enter_context(ThreadPoolExecutor(1, "sync"))
            self._part.file.truncate(self.size)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor."""
        self.put_pieces(name, (tensor,))

    def put_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write a tensor from consecutive parts along its first axis. A part may be reused once the next is requested."""
        dtype, shape = self._specs[name]
        offset = self._offsets[name]
        end = offset + bytes_of(dtype, shape)
        for piece in pieces:
            if piece.dtype != dtype or tuple(piece.shape[1:]) != shape[1:]:
                raise AssertionError(f"{name}: {piece.dtype} {tuple(piece.shape)} produced, {dtype} {shape} announced")
            if piece.numel():
                flat = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                if offset + flat.numel() > end:
                    raise AssertionError(f"{name}: more than the announced {shape} produced")
                self._write(offset, flat.numpy().data)
                offset += flat.numel()
        if offset != end:
            raise AssertionError(f"{name}: less than the announced {shape} produced")
        self._missing.discard(name)

    def finish(self, metadata: Mapping[str, str], check: Callable[[Path], object] | None = None) -> None:
        """Sync the file to disk and let it replace the target, once every tensor is written.

        `metadata` may differ from what the constructor got, but its JSON may not be longer. `check` gets the path of the
        complete file before that; if it raises, the target stays as it was.
        """
        if self._missing:
            raise AssertionError(f"{len(self._missing)} tensors were never written, {min(self._missing)} among them")
        header = _header(self._specs, metadata, self._header_size)
        self._write(0, memoryview(header))
        if check is not None:
            check(self._part.path)
        with self._reporting():
            if self._syncing is not None:
                self._syncing.result()
            self._part.commit()

    def _write(self, offset: int, data: memoryview) -> None:
        with self._reporting():
            self._part.file.seek(offset)
            while data:
                count = self._part.file.write(data)
                data = data[count:]
                self._unsynced += count
            if self._unsynced >= _SYNC_EVERY:
                self._sync()

    def _sync(self) -> None:
        """Start syncing what is written so far, so that `finish` does not wait for all of it."""
        if self._syncing is not None:
            self._syncing.result()
        self._syncing = self._pool.submit(sync_file, self._part.file.fileno())
        self._unsynced = 0

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                self._undo.close()
            if error.errno == errno.ENOSPC:
                raise _no_space(self._target, self.size) from None
            raise CheckpointError(f"{self._target}: cannot be written ({error.strerror or error}).") from None

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._undo.close()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file with TensorWriter. `produce(name)` is called once per tensor and returns it."""
    with TensorWriter(path, tensors, metadata) as writer:
        for name in writer.names:
            writer.put(name, produce(name))
        writer.finish(metadata)


def _header(
    tensors: Mapping[str, tuple[torch.dtype, Shape]], metadata: Mapping[str, str], size: int | None = None
) -> bytes:
    """Return the header: length and JSON, padded to `size` bytes, by default to the next multiple of ALIGNMENT."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + bytes_of(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + -(8 + len(text)) % ALIGNMENT if size is None else size - 8
    if len(text) > length:
        raise AssertionError(f"the header has grown from {length} to {len(text)} bytes")
    return struct.pack("<Q", length) + text.ljust(length)


def _check_space(target: Path, needed: int) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Create it, or write elsewhere.")
    if target.is_dir():
        raise CheckpointError(f"{target}: a folder, not a file.")
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{folder}: this folder cannot be written to.")
    if shutil.disk_usage(folder).free < needed:
        raise _no_space(target, needed)


def _no_space(target: Path, needed: int) -> CheckpointError:
    free = shutil.disk_usage(target.parent).free
    return CheckpointError(
        f"{target}: the disk is full. {needed:,} bytes are needed, {free:,} are free. Nothing was changed."
    )

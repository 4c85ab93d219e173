"""One safetensors file: opened by mapping, written tensor by tensor and atomically. Memory does not grow with it."""

from __future__ import annotations

import errno
import glob
import json
import mmap
import os
import platform
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .keys import bfl_spelling, prefix_of

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# How files begin that get mistaken for safetensors files, and what they are.
_OTHER_FILES = (
    (b"GGUF", "a GGUF, which is quantised; take the model's bfloat16, float16 or float8 .safetensors"),
    (b"PK\x03\x04", "a zip, as PyTorch writes .pt and .ckpt; take the model's .safetensors"),
    (b"\x80", "a pickle, as old PyTorch writes .pt and .ckpt; take the model's .safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer to one; fetch the file itself (git lfs pull)"),
    (b"<", "a web page, probably an error message; download the file again"),
)

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
ALIGNMENT = 64  # bytes; a mapped tensor that lies otherwise is slower to compute with

Shape = tuple[int, ...]


class CheckpointError(ValueError):
    """A file or state dict that is not what it should be; the message says what was found and what to do."""


class TensorFile:
    """An open safetensors file. Nothing is read but the header until `tensor` is asked, and that maps.

    Names are BFL's, without a `model.diffusion_model.` prefix; with one, only the tensors under it are seen.
    With `copy_on_write` the tensors may be written to: what is written becomes memory, the file stays as it is.
    `shapes` and `dtypes` are in the file's order. Raises CheckpointError if the file cannot be one.
    """

    # Not safetensors.safe_open: it maps privately, which Linux refuses for files larger than the memory.

    def __init__(self, path: str | os.PathLike[str], *, copy_on_write: bool = False) -> None:
        self.path = Path(path)
        self.size, header, self._start = _read_header(self.path)  # bytes on disk; data begin at _start
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        prefix = prefix_of(header)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        for stored_name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            if stored_name.startswith(prefix):
                name = bfl_spelling(stored_name[len(prefix) :])
                self.shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = DTYPES[entry["dtype"]]
                self._spans[name] = tuple(entry["data_offsets"])
        with open(self.path, "rb") as file:
            self._map = _mapped(file.fileno(), copy_on_write)
        self._copy_on_write = copy_on_write

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file; without copy_on_write, writing into it kills the process. KeyError for an unknown name."""
        begin, end = self._spans[name]
        if begin == end:
            return torch.empty(self.shapes[name], dtype=self.dtypes[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            view = memoryview(self._map)[self._start + begin : self._start + end]
            return torch.frombuffer(view, dtype=self.dtypes[name]).view(self.shapes[name])

    def span(self, name: str) -> tuple[int, int]:
        """Where in the file a tensor begins and ends, in bytes."""
        begin, end = self._spans[name]
        return self._start + begin, self._start + end

    def release(self, name: str) -> None:
        """Give back the memory pages of a tensor that has been read; read again, it comes from the disk again."""
        if hasattr(self._map, "madvise") and not self._copy_on_write:  # there is none on Windows
            begin, end = self.span(name)
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # of whole pages: the others are a neighbour's too
            if (length := (end - begin) // mmap.PAGESIZE * mmap.PAGESIZE) > 0:
                self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def close(self) -> None:
        """Unmap, at once or when the last tensor is gone."""
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Lets Linux map more than it has memory for. Python names it from 3.13 on.
_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0


def _mapped(descriptor: int, copy_on_write: bool) -> mmap.mmap:
    if not copy_on_write:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    if os.name == "nt":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_header(path: Path) -> tuple[int, dict[str, Any], int]:
    """(bytes of the file, header, where the data begin), the header checked against the file's size."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not a file' if path.is_dir() else 'there is no such file'}.")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty (0 bytes). Download or convert it again.")
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= MAX_HEADER else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if size < 8 or length > MAX_HEADER or text[:1] not in (b"{", b""):
        raise CheckpointError(f"{path}: not a safetensors file{_what_it_is(path)}.")
    if len(text) < length:
        raise _damaged(path, size, 8 + length)
    start, end = 8 + length, 0
    try:
        header = json.loads(text)
        entries = [header[name] for name in header if name != "__metadata__"]
        for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: has {entry['dtype']} tensors; expected {', '.join(DTYPES)}.")
            begin, next_end = entry["data_offsets"]
            if begin != end or next_end - begin != _bytes(DTYPES[entry["dtype"]], tuple(entry["shape"])):
                raise CheckpointError(f"{path}: the header contradicts itself; the file is damaged.")
            end = next_end
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: not a safetensors file (its header cannot be read).") from None
    if start + end != size:
        raise _damaged(path, size, start + end)
    return size, header, start


def _what_it_is(path: Path) -> str:
    """Of files that stand where a safetensors file was expected: what they are, and what to do."""
    with open(path, "rb") as file:
        start = file.read(64)
    for magic, what in _OTHER_FILES:
        if start.startswith(magic):
            return f", but {what}"
    return ""


def _damaged(path: Path, found: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: the file is truncated or damaged: it has {found:,} bytes, its header announces {expected:,}. "
        "Download or convert it again."
    )


class TensorWriter:
    """A safetensors file in the making: every tensor has its place from the start, and they are put there in any order.

    Tensors whose size is a multiple of ALIGNMENT come first, and of the others the largest element types, so that all
    are aligned, and those of any size as processors like it; else the given order stands. The bytes
    go to a file beside the target which takes its name in `finish`: a crash leaves the old file or none. To be used
    in a `with`, which unless finished leaves nothing half-written. Raises CheckpointError for an unwritable folder
    or a full disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[torch.dtype, Shape]],
        metadata: Mapping[str, str],
    ) -> None:
        self._target = Path(os.path.realpath(path))
        place = {name: (_bytes(*spec) % ALIGNMENT != 0, -spec[0].itemsize) for name, spec in tensors.items()}
        self._specs = {name: tensors[name] for name in sorted(tensors, key=place.__getitem__)}
        header = _header(self._specs, metadata)
        self._offsets: dict[str, int] = {}
        end = self._header_size = len(header)
        for name, spec in self._specs.items():
            self._offsets[name] = end
            end += _bytes(*spec)
        self.size = end  # of the whole file
        self.names = tuple(self._specs)  # in the order of their places
        self._missing = set(self._specs)
        self._part = self._target.with_name(f".{self._target.name}.{os.getpid()}.part")
        self._undo = ExitStack()
        _remove_stale_parts(self._target)
        _check_space(self._target, self.size)
        with self._reporting():
            self._file = self._undo.enter_context(FileIO(self._part, "x"))
            self._undo.callback(self._part.unlink, missing_ok=True)
            _lock(self._file)
            self._file.truncate(self.size)

    def put(self, name: str, tensor: Tensor) -> None:
        """A whole tensor."""
        self.put_pieces(name, (tensor,))

    def put_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """A tensor as consecutive parts along its first axis. A part may be overwritten as soon as the next is asked."""
        dtype, shape = self._specs[name]
        offset = self._offsets[name]
        end = offset + _bytes(dtype, shape)
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

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Every tensor is there: make the file durable and give it its name. `metadata` as long as announced, or shorter."""
        if self._missing:
            raise AssertionError(f"{len(self._missing)} tensors were never written, {min(self._missing)} among them")
        header = _header(self._specs, metadata, self._header_size)
        self._write(0, memoryview(header))
        with self._reporting():
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self._target)
            _sync_folder(self._target.parent)

    def _write(self, offset: int, data: memoryview) -> None:
        with self._reporting():
            self._file.seek(offset)
            while data:
                data = data[self._file.write(data) :]

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


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file as TensorWriter does: `produce(name)` is asked once for each of `tensors`, one at a time."""
    with TensorWriter(path, tensors, metadata) as writer:
        for name in writer.names:
            writer.put(name, produce(name))
        writer.finish(metadata)


def _header(
    tensors: Mapping[str, tuple[torch.dtype, Shape]], metadata: Mapping[str, str], size: int | None = None
) -> bytes:
    """Length and JSON, padded to `size` bytes, by default to the next multiple of ALIGNMENT."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + _bytes(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + -(8 + len(text)) % ALIGNMENT if size is None else size - 8
    if len(text) > length:
        raise AssertionError(f"the header has grown from {length} to {len(text)} bytes")
    return struct.pack("<Q", length) + text.ljust(length)


def _bytes(dtype: torch.dtype, shape: Shape) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


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


def _lock(file: FileIO) -> None:
    """Held as long as this process lives, so that others can tell its unfinished file from a dead one's."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_stale_parts(target: Path) -> None:
    """Delete what killed processes left of this target. Windows refuses to delete a file that is still open."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        if not re.fullmatch(r"\d+", part.name[len(target.name) + 2 : -len(".part")]):
            continue
        with suppress(OSError):
            with open(part, "rb") as file:
                if fcntl is not None:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name durable; Windows has no such thing."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

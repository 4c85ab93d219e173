"""One safetensors file, opened by memory mapping: only what is used is read. tensor_writer.py writes such files."""

from __future__ import annotations

import math
import mmap
import os
import platform
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .foreign import MessageError, read_json
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
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# First bytes of files that are mistaken for safetensors files, and what these files are.
_OTHER_FILES = (
    (b"GGUF", "a GGUF, which is quantised; take the model's bfloat16, float16 or float8 .safetensors"),
    (b"PK\x03\x04", "a zip, as PyTorch writes .pt and .ckpt; take the model's .safetensors"),
    (b"\x80", "a pickle, as old PyTorch writes .pt and .ckpt; take the model's .safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer to one; fetch the file itself (git lfs pull)"),
    (b"<", "a web page, probably an error message; download the file again"),
)

_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_MAX_AXES, _MAX_ELEMENTS = 8, 1 << 48  # axes of no elements do not count; torch multiplies them all the same
ALIGNMENT = 64  # bytes; computing with a mapped tensor at another address is slower

Shape = tuple[int, ...]


class CheckpointError(MessageError):
    """A file or state dict is not as expected; the message says what was found and what to do."""


class FileState(NamedTuple):
    """Size, time and identity of a file, by which a change is noticed."""

    size: int
    modified: int  # nanoseconds
    inode: int

    @classmethod
    def of(cls, path: str | os.PathLike[str] | int) -> FileState:
        """Return the state of a file, given its path or descriptor. Raises OSError."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class TensorFile:
    """An open safetensors file. Opening it reads the header alone; `tensor` maps, and the system reads what is used.

    Names are BFL's, without a `model.diffusion_model.` prefix. In a file with that prefix, other tensors are ignored.
    With `copy_on_write`, tensors may be written to in memory; the file does not change.
    `shapes` and `dtypes` are in the file's order. Raises CheckpointError if this is not a whole safetensors file.
    """

    # safetensors.safe_open maps privately, which Linux refuses for files larger than the memory.

    def __init__(self, path: str | os.PathLike[str], *, copy_on_write: bool = False) -> None:
        self.path = Path(path)
        self.size, header, self._start = _read_header(self.path)  # bytes on disk; the tensors begin at _start
        self.metadata: dict[str, str] = header.pop(_METADATA, None) or {}
        prefix = prefix_of(header)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        for stored_name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            if stored_name.startswith(prefix):
                name = bfl_spelling(stored_name[len(prefix) :])
                if name in self.shapes:
                    raise CheckpointError(f"{self.path}: has {name} in two spellings; delete one of them.")
                self.shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = DTYPES[entry["dtype"]]
                self._spans[name] = tuple(entry["data_offsets"])
        with open(self.path, "rb") as file:
            self.state = FileState.of(file.fileno())
            if self.state.size != self.size:
                raise _damaged(self.path, self.state.size, self.size)
            self._map = _mapped(file.fileno(), copy_on_write)
        self._copy_on_write = copy_on_write

    def tensor(self, name: str) -> Tensor:
        """Return a view of the mapped file. Raises KeyError for an unknown name.

        Without copy_on_write, writing into it kills the process.
        """
        begin, end = self._spans[name]
        if begin == end:
            return torch.empty(self.shapes[name], dtype=self.dtypes[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            view = memoryview(self._map)[self._start + begin : self._start + end]
            return torch.frombuffer(view, dtype=self.dtypes[name]).view(self.shapes[name])

    def span(self, name: str) -> tuple[int, int]:
        """Return a tensor's first byte and the one after its last byte in the file."""
        begin, end = self._spans[name]
        return self._start + begin, self._start + end

    def release(self, name: str) -> None:
        """Free the memory pages of a tensor that has been read. Reading it again reads the disk again."""
        if hasattr(self._map, "madvise") and not self._copy_on_write:  # Windows has no madvise
            begin, end = self.span(name)
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: the others also hold a neighbour
            if (length := (end - begin) // mmap.PAGESIZE * mmap.PAGESIZE) > 0:
                self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def close(self) -> None:
        """Unmap the file, now or when its last tensor is freed."""
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Lets Linux map more than its memory. Python has a name for it from 3.13 on.
_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0


def _mapped(descriptor: int, copy_on_write: bool) -> mmap.mmap:
    if not copy_on_write:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    if os.name == "nt":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_header(path: Path) -> tuple[int, dict[str, Any], int]:
    """Return (file size, header, first byte of the tensors); the header is checked against the file size."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not a file' if path.is_dir() else 'there is no such file'}.")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty (0 bytes). Download or convert it again.")
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _MAX_HEADER else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if size < 8 or length > _MAX_HEADER or text[:1] not in (b"{", b""):
        raise CheckpointError(f"{path}: not a safetensors file{_other_kind(path)}.")
    if len(text) < length:
        raise _damaged(path, size, 8 + length)
    start, end = 8 + length, 0
    try:
        header = read_json(text)
        _check_entries(header)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file (its header cannot be read: {error}).") from None
    entries = [header[name] for name in header if name != _METADATA]
    for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: has {entry['dtype'][:40]} tensors; expected {', '.join(DTYPES)}.")
        begin, next_end = entry["data_offsets"]
        if begin != end or next_end - begin != bytes_of(DTYPES[entry["dtype"]], tuple(entry["shape"])):
            raise CheckpointError(f"{path}: the header contradicts itself; the file is damaged.")
        end = next_end
    if start + end != size:
        raise _damaged(path, size, start + end)
    return size, header, start


def _check_entries(header: Any) -> None:
    """Raise ValueError for a header whose parts are not of the types of the safetensors format."""
    if not isinstance(header, dict):
        raise ValueError("it is not an object")
    for name, entry in header.items():
        if name == _METADATA:
            texts = isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())
            if entry is not None and not texts:
                raise ValueError(f"{_METADATA} is not an object of texts")
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"{name[:100]} has no dtype")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"shape or data_offsets of {name[:100]} are not whole numbers from 0")
        if len(shape) > _MAX_AXES or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
            raise ValueError(f"{name[:100]} has a shape that no tensor has")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _other_kind(path: Path) -> str:
    """Describe a file that is mistaken for a safetensors file, and what to do; empty for an unknown kind."""
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


def is_finite(tensor: Tensor) -> bool:
    """Test a tensor for NaN and infinity. Their sum has either too, which is quicker than a look at every value."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype in FLOAT8:
        tensor = tensor.to(torch.bfloat16)
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())  # the sum of large finite values overflows


def bytes_of(dtype: torch.dtype, shape: Shape) -> int:
    """Return the size of a tensor in a file, in bytes."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count

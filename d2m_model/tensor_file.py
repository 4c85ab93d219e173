"""One safetensors file: opened by mapping, written tensor by tensor and atomically. Memory does not grow with it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import platform
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .keys import bfl_spelling, prefix_of

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

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit

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

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file; without copy_on_write, writing into it kills the process. KeyError for an unknown name."""
        begin, end = self._spans[name]
        if begin == end:
            return torch.empty(self.shapes[name], dtype=self.dtypes[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            view = memoryview(self._map)[self._start + begin : self._start + end]
            return torch.frombuffer(view, dtype=self.dtypes[name]).view(self.shapes[name])

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
        raise CheckpointError(f"{path}: not a safetensors file.")
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


def _damaged(path: Path, found: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: the file is truncated or damaged: it has {found:,} bytes, its header announces {expected:,}. "
        "Download or convert it again."
    )


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file: `produce(name)` is asked once for each of `tensors`, one at a time.

    The largest element types come first, so that every tensor is aligned; else the given order stands. The bytes
    go to a file beside the target which then takes its name: a crash leaves the old file or none. Raises
    CheckpointError for an unwritable folder or a full disk; whatever is raised, nothing half-written stays.
    """
    target = Path(os.path.realpath(path))
    names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)  # stable
    header = _header({name: tensors[name] for name in names}, metadata)
    needed = len(header) + sum(_bytes(*tensors[name]) for name in names)
    _check_space(target, needed)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            file.write(header)
            for name in names:
                _write_tensor(file, name, produce(name), *tensors[name])
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            part.unlink(missing_ok=True)
            raise _no_space(target, needed) from None
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error}).") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _header(tensors: Mapping[str, tuple[torch.dtype, Shape]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + _bytes(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor, dtype: torch.dtype, shape: Shape) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} produced, {dtype} {shape} announced")
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


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


def _sync_folder(folder: Path) -> None:
    """Make the new name durable; Windows has no such thing."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""One safetensors file: opened by mapping, written tensor by tensor and atomically. Memory does not grow with it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
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

Shape = tuple[int, ...]


class CheckpointError(ValueError):
    """A file or state dict that is not what it should be; the message says what was found and what to do."""


class TensorFile:
    """An open safetensors file. Nothing is read but the header until `tensor` is asked, and that maps.

    Names are BFL's, without a `model.diffusion_model.` prefix; with one, only the tensors under it are seen.
    `shapes` and `dtypes` are in the file's order. Raises CheckpointError if the file cannot be one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._handle = _open(self.path)
        self.metadata: dict[str, str] = self._handle.metadata() or {}
        # Older safetensors list names in alphabetical order only.
        stored = list(getattr(self._handle, "offset_keys", self._handle.keys)())
        prefix = prefix_of(stored)
        self._stored = {bfl_spelling(name[len(prefix) :]): name for name in stored if name.startswith(prefix)}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, stored_name in self._stored.items():
            view = self._handle.get_slice(stored_name)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: {name} is stored as {view.get_dtype()}; expected one of {', '.join(DTYPES)}."
                )
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = DTYPES[view.get_dtype()]

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file: do not write into it. KeyError for an unknown name."""
        tensor: Tensor = self._handle.get_tensor(self._stored[name])
        return tensor

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    def close(self) -> None:
        self._handle.__exit__(None, None, None)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not a file' if path.is_dir() else 'there is no such file'}.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty (0 bytes). Download or convert it again.")
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except SafetensorError as error:
        if "incomplete" in str(error).lower() or "invalid offset" in str(error).lower():
            raise CheckpointError(
                f"{path}: the file is truncated or damaged: its {path.stat().st_size:,} bytes are not what its header "
                "announces. Download or convert it again."
            ) from None
        raise CheckpointError(f"{path}: not a safetensors file ({error}).") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error}).") from None


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
        file.write(memoryview(flat.view(torch.uint8).numpy()))


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

"""Reading of torch.distributed.checkpoint's files without running code that somebody may have put into them.

torch unpickles a checkpoint's `.metadata` and every value that is no tensor. Whoever can write into a run's folder could
so run code at the next resume. Here only the types that such a checkpoint consists of are unpickled.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = ".metadata"
_TYPES = {
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}
_TYPES["pathlib._local"] = _TYPES["pathlib"]  # the module's name in Python 3.13


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _TYPES.get(module, ()):
            return super().find_class(module, name)
        known = getattr(torch, name, None) if module == "torch" else None
        if known is torch.Size or isinstance(known, torch.dtype):
            return known
        raise pickle.UnpicklingError(f"its {_METADATA} names {module}.{name}, which no checkpoint needs")


class CheckpointReader(FileSystemReader):
    """A FileSystemReader that unpickles nothing but descriptions of tensors. Use it with CheckpointPlanner."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its {_METADATA} holds a {type(metadata).__name__}")
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"its {_METADATA} names a file elsewhere, {stored.relative_path}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckpointPlanner(DefaultLoadPlanner):
    """A DefaultLoadPlanner that reads values that are no tensors as torch reads weights."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)

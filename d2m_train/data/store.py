"""What encoders made, kept on disk by content: one file an entry, whole or not there, and checked when it is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import UserError

_CHECKSUM = "sha256"  # in an entry's metadata
_STALE = 24 * 3600  # seconds after which an unfinished file has no writer any more


class DamagedEntry(Exception):
    """An entry whose bytes are not those that were written; the message names its file."""


class Store:
    """A folder of entries `kind/ke/key.safetensors`, and of small JSON files.

    Any number of processes may write at once, the same entry too: every one writes a file of its own under `.unfinished`,
    which then takes its name. A crash leaves such a file at worst. Raises UserError for a full disk or a folder that
    cannot be written; what is there stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unfinished = folder / ".unfinished"
        for file in self._unfinished.glob("*"):
            try:
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()
            except OSError:  # another process was first
                continue

    def file(self, kind: str, key: str) -> Path:
        """Where an entry lies, or would."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is there; its content is not looked at."""
        return self.file(kind, key).exists()

    def get(self, kind: str, key: str, *, check: bool = True) -> dict[str, Tensor] | None:
        """The entry, or None where there is none. Raises DamagedEntry.

        `check` False leaves the checksum out, of an entry that is known to be sound: nothing is read until it is used.
        """
        file = self.file(kind, key)
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
                announced = (stored.metadata() or {}).get(_CHECKSUM)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            raise DamagedEntry(f"{file} is damaged ({error})") from None
        if check and announced != _checksum(tensors):
            raise DamagedEntry(f"{file} is damaged (its checksum is another)")
        return tensors

    def put(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry, over one that is there."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(self.file(kind, key), save(tensors, {_CHECKSUM: _checksum(tensors)}))

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; None where there is nothing, or nothing whole."""
        try:
            stored = json.loads((self.folder / f"{name}.json").read_bytes())
            return stored["value"] if stored[_CHECKSUM] == _json_checksum(stored["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_json(self, name: str, value: Any) -> None:
        self._write(
            self.folder / f"{name}.json", json.dumps({_CHECKSUM: _json_checksum(value), "value": value}).encode()
        )

    def _write(self, target: Path, data: bytes) -> None:
        # Not synced: what a power failure garbles, the checksum tells, and it is made again.
        part = self._unfinished / uuid.uuid4().hex
        try:
            for folder in (part.parent, target.parent):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(data)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.folder).free
                raise UserError(
                    f"{self.folder}: the disk is full: {len(data):,} bytes are needed for one entry, {free:,} are free. "
                    "What is there is kept: make room, or set data.cache to a folder on another disk, and run again."
                ) from None
            raise UserError(f"{target}: cannot be written ({error.strerror or error}); set data.cache.") from None


def content_key(*parts: object) -> str:
    """A key: the hash of the parts' texts."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:40]


def _json_checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()

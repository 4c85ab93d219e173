"""Store of encoders' results on disk, by content: a file per entry, written atomically and checked when it is read."""

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

_CHECKSUM = "sha256"  # key in an entry's metadata
_STALE = 24 * 3600  # seconds after which an unfinished file counts as abandoned


class DamagedEntry(Exception):
    """An entry's bytes are not those that were written; the message names its file."""


class Store:
    """A folder of entries `kind/ke/key.safetensors`, and of small JSON files.

    Processes of any number of machines may write at once, even the same entry: each writes its own file under
    `.unfinished`, which then replaces the entry. It is not synced to disk as atomic_file does, which would slow the
    encoding of many small entries: if a power failure damages one, its checksum shows it and it is made again. Raises
    UserError for a full disk or a folder that cannot be written; existing entries stay.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unfinished = folder / ".unfinished"
        for file in self._unfinished.glob("*"):
            try:
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()
            except OSError:  # another process has removed it
                continue

    def file(self, kind: str, key: str) -> Path:
        """Return the path of an entry, whether it exists or not."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Return whether the entry exists; its content is not checked."""
        return self.file(kind, key).exists()

    def get(self, kind: str, key: str, *, check: bool = True) -> dict[str, Tensor] | None:
        """Return an entry, or None if there is none. Raises DamagedEntry.

        With `check` False the checksum is not verified, and nothing is read from disk until it is used.
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
            raise DamagedEntry(f"{file} is damaged (its checksum differs)")
        return tensors

    def put(self, kind: str, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry, or replace it."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(self.file(kind, key), save(tensors, {_CHECKSUM: _checksum(tensors)}))

    def read_json(self, name: str) -> Any:
        """Return what `write_json` wrote; None if there is nothing, or it is damaged."""
        try:
            stored = json.loads((self.folder / f"{name}.json").read_bytes())
            return stored["value"] if stored[_CHECKSUM] == _json_checksum(stored["value"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write_json(self, name: str, value: Any) -> None:
        self._write(
            self.folder / f"{name}.json", json.dumps({_CHECKSUM: _json_checksum(value), "value": value}).encode()
        )

    def _write(self, target: Path, data: bytes) -> None:
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
                    "Existing entries are kept: make room, or set data.cache to a folder on another disk, and run again."
                ) from None
            raise UserError(f"{target}: cannot be written ({error.strerror or error}); set data.cache.") from None


def content_key(*parts: object) -> str:
    """Return a key: the hash of the parts' texts."""
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:40]  # names of files may not be UTF-8


def _json_checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes."""
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()

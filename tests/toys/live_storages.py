"""Bytes of the storages that tensors of a `with` have, as an allocator would see them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts what operators make, and not what was there before. `peak` is the most that was alive after any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) in (torch.Tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                self._storages.setdefault(storage._cdata, weakref.ref(storage, self._forget(storage._cdata)))
        # A storage may change its size: FSDP2 frees gathered weights so.
        self.peak = max(self.peak, sum(s.nbytes() for ref in self._storages.values() if (s := ref()) is not None))
        return out

    def _forget(self, key: int) -> Any:
        return lambda _: self._storages.pop(key, None)

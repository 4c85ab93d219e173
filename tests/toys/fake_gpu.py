"""Tensors without values on the device "cuda": what a GPU would hold and wait for, on a machine without one.

FakeTensorMode gives them devices, dtypes and shapes. Modes on top of it count memory and the host's waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda")
BLOCK = 512  # bytes: the unit of torch's allocator


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the GPU's tensors that are made under this mode: those alive `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._add((args, kwargs), made=False)
        result = func(*args, **kwargs)
        self._add(result, made=True)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, values: Any, *, made: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.is_cuda and value.untyped_storage()._cdata not in self.sizes:
                storage = value.untyped_storage()
                size = -(-storage.nbytes() // BLOCK) * BLOCK if made else 0
                self.sizes[storage._cdata] = size
                self.now += size
                weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

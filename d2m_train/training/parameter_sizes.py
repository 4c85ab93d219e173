"""Sizes in bytes of trained parameters and their optimizer state, without the parameters themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..parallel.parameters import shard_axis
from ..run_config import RunConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class ParameterSize:
    """A parameter by name, shape and dtype, full or sharded."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @classmethod
    def of(cls, name: str, parameter: torch.Tensor) -> ParameterSize:
        return cls(name=name, shape=tuple(parameter.shape), dtype=parameter.dtype, trained=parameter.requires_grad)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def shard(self, processes: int) -> ParameterSize:
        """The part that FSDP2 gives to each process: one axis in equal parts, the last ones padded."""
        axis = shard_axis(self.shape, processes)
        part = -(-self.shape[axis] // processes)
        return replace(self, shape=(*self.shape[:axis], part, *self.shape[axis + 1 :]))


def optimizer_bytes(run: RunConfig, trained: Sequence[ParameterSize]) -> int:
    """Bytes of AdamW's state: two moments like the weight, and a float32 step for each parameter.

    In 8 bits: a byte for each moment and a float32 scale for every 256 of them, except for tensors of fewer than 4,096
    numbers.
    """
    if run.training.optimizer != "adamw_8bit":
        return sum(2 * weight.nbytes + 4 for weight in trained)
    small = sum(8 * weight.count for weight in trained if weight.count < 4096)
    return small + sum(2 * (weight.count + 4 * -(-weight.count // 256)) for weight in trained if weight.count >= 4096)


def checkpoint_bytes(run: RunConfig, trained: Sequence[ParameterSize]) -> int:
    """Bytes of one checkpoint: weights, their averages where there are some, and optimizer state."""
    copies = 2 if run.training.ema is not None else 1
    return copies * sum(weight.nbytes for weight in trained) + optimizer_bytes(run, trained)

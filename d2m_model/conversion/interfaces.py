"""Interfaces of a conversion: the teacher that it reads, and the plan for every FFN and for the modulations.

Shapes: H hidden size, N = S + E F neurons, S shared neurons, E experts, F expert width, A AdaLN rank, O modulation outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..routers import RouterTensors
from ..tensor_file import Shape


class TeacherTensors(Protocol):
    """A dense FLUX.1 as a conversion reads it: by BFL names, each tensor about once. See teacher.DenseTeacher.

    `files` is empty for a teacher in memory. `size` is the number of bytes that `span` refers to.
    """

    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...
    def tensor(self, name: str) -> Tensor: ...
    def span(self, name: str) -> tuple[int, int]: ...
    def release(self, name: str) -> None: ...


@dataclass(kw_only=True, slots=True, frozen=True)
class FFNWeights:
    """Weights of a dense FFN, W2 gelu_tanh(W1 x + b1) + b2: read-only views of the teacher's file."""

    up_NH: Tensor
    up_bias_N: Tensor
    down_HN: Tensor
    down_bias_H: Tensor


@dataclass(kw_only=True, slots=True, frozen=True)
class FFNPlan:
    """Conversion of one dense FFN. Without the refit tensors its weights are the teacher's, permuted."""

    order_N: Tensor  # int32: position -> neuron of the dense FFN
    router: RouterTensors  # by their names in the file after the FFN's
    expert_mean_EH: Tensor | None = None  # float32
    shared_down_HS: Tensor | None = None  # refit: W2 of the shared expert, its neurons in the new order
    down_bias_H: Tensor | None = None  # refit: b2


# Called with the FFN's name once per FFN, in the order of the file; the result is dropped as soon as it is written.
PlanFFN = Callable[[str, FFNWeights], FFNPlan]


class Modulations(Protocol):
    """AdaLN compression (Sec. 4.1): mod.lin(silu(vec)) becomes lin'(U silu(vec))."""

    adaln_in_AH: Tensor  # U, float32

    def compress(self, name: str, weight_OH: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Return lin' of the modulation with this BFL name: float32 weight [O, A] and bias [O]."""
        ...

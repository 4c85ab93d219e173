"""Linear layers with copies of given weights, among them a router's, which gives its weights when called."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Linear = TypeVar("Linear", bound=nn.Linear)


class RouterLinear(nn.Linear):
    """Weight and bias of a router. Calling it returns them, since offloading libraries bring a layer in when called."""

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return self.weight, self.bias


def copied_parameter(values: Tensor) -> nn.Parameter:
    """A contiguous copy."""
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def copied_linear(weight: Tensor, bias: Tensor | None, kind: type[Linear]) -> Linear:
    """A linear layer of class `kind` with copies of weight and bias."""
    layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = copied_parameter(weight)
    if bias is not None:
        layer.bias = copied_parameter(bias)
    return layer

"""Positions of an FFN's neurons in FLUX's fused weights, and their reordering.

A MoE FFN is a permuted dense FFN: the shared expert's neurons first, then expert 0, expert 1, ... Experts are slices.
Shapes: H hidden size, N = 4H neurons, S shared neurons, E experts, F expert width; N = S + E F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import FFN
from .config import FFNLayout


@dataclass(kw_only=True, slots=True, frozen=True)
class FFNTensors:
    """BFL names of the modules that hold one FFN, and the positions of its neurons in them.

    `up` holds W1 as rows first_row ... first_row + N (weight and bias), `down` holds W2 as columns
    first_column ... first_column + N. The bias of `down` belongs to no neuron (b2, the shared expert's).
    """

    up: str
    first_row: int
    down: str
    first_column: int


def ffn_tensors(name: str, hidden_size: int) -> FFNTensors:
    """Return the modules of the FFN with this BFL name. Raises ValueError for any other name."""
    ffn = FFN.parse(name)
    up, down = ffn.linears
    fused = ffn.stream == "joint"  # q, k and v come before W1, the attention's projection before W2
    return FFNTensors(up=up, first_row=3 * hidden_size * fused, down=down, first_column=hidden_size * fused)


def neuron_axis(tensor_name: str, name: str, hidden_size: int) -> tuple[int, int] | None:
    """Return (axis, first index) of the neurons of FFN `name` in a tensor, or None if the tensor has none of them."""
    tensors = ffn_tensors(name, hidden_size)
    if tensor_name in (f"{tensors.up}.weight", f"{tensors.up}.bias"):
        return 0, tensors.first_row
    if tensor_name == f"{tensors.down}.weight":
        return 1, tensors.first_column
    return None


def permute_neurons(tensor: Tensor, axis: int, first: int, order: Tensor) -> Tensor:
    """Return a copy with the neurons along `axis`, from index `first` on, in `order`: new[i] = old[order[i]]."""
    permuted = tensor.clone()
    neurons = tensor.narrow(axis, first, order.numel())
    permuted.narrow(axis, first, order.numel()).copy_(neurons.index_select(axis, order.to(tensor.device, torch.int64)))
    return permuted


def inverse_order(order: Tensor) -> Tensor:
    """Return the permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    return inverse


def expert_views(up_NH: Tensor, up_bias_N: Tensor, down_HN: Tensor, layout: FFNLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the routed experts as strided views, without a copy: up [E, F, H], up bias [E, F], down [H, E, F]."""
    up_EFH = up_NH[layout.shared :].unflatten(0, (layout.experts, layout.width))
    bias_EF = up_bias_N[layout.shared :].unflatten(0, (layout.experts, layout.width))
    down_HEF = down_HN[:, layout.shared :].unflatten(1, (layout.experts, layout.width))
    return up_EFH, bias_EF, down_HEF

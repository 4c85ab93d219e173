"""Grouped matrix product in torch's operators: torch's own kernel where it takes the operands, a loop over experts elsewhere.

Shapes: A rows, E experts, D depth of the product, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor


def cast_for_autocast(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in autocast's dtype where autocast is on, otherwise as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def grouped_mm(a_AD: Tensor, b_EDN: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply rows ends_E[e-1] ... ends_E[e] of a by b[e]: [A, N]. This is the place to exchange kernels.

    ends_E is int32, non-decreasing, and ends with A. a and b have the same dtype, except under autocast.
    """
    a_AD, b_EDN = cast_for_autocast(a_AD, b_EDN)
    return _grouped_mm(a_AD, b_EDN, ends_E)


# A custom operator, because torch traces its own grouped_mm for bfloat16 only, and because the loop over experts reads
# ends_E on the host, which a graph cannot do.
@torch.library.custom_op("d2m::grouped_mm", mutates_args=())
def _grouped_mm(a_AD: Tensor, b_EDN: Tensor, ends_E: Tensor) -> Tensor:
    if _native(a_AD, b_EDN):
        return torch._grouped_mm(a_AD, b_EDN, offs=ends_E)
    out_AN = a_AD.new_empty(a_AD.shape[0], b_EDN.shape[2])
    for expert, rows in enumerate(_groups(ends_E) if a_AD.shape[0] else ()):
        torch.mm(a_AD[rows], b_EDN[expert], out=out_AN[rows])
    return out_AN


@torch.library.custom_op("d2m::grouped_mm_weight_grad", mutates_args=())
def _grouped_mm_weight_grad(grad_AN: Tensor, a_AD: Tensor, ends_E: Tensor) -> Tensor:
    """Return d loss / d b as [E, N, D], the layout of an nn.Linear's weight."""
    if _native(grad_AN.t(), a_AD):
        grad_END = torch._grouped_mm(grad_AN.t(), a_AD, offs=ends_E)
        # Some GPU kernels do not write the gradient of an expert without rows (pytorch issue 172439).
        without_rows_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return grad_END.masked_fill_(without_rows_E[:, None, None], 0)
    if a_AD.shape[0] == 0:
        return a_AD.new_zeros(ends_E.shape[0], grad_AN.shape[1], a_AD.shape[1])
    out_END = a_AD.new_empty(ends_E.shape[0], grad_AN.shape[1], a_AD.shape[1])
    for expert, rows in enumerate(_groups(ends_E)):
        torch.mm(grad_AN[rows].t(), a_AD[rows], out=out_END[expert])
    return out_END


@_grouped_mm.register_fake
def _(a_AD: Tensor, b_EDN: Tensor, ends_E: Tensor) -> Tensor:
    return a_AD.new_empty(a_AD.shape[0], b_EDN.shape[2])


@_grouped_mm_weight_grad.register_fake
def _(grad_AN: Tensor, a_AD: Tensor, ends_E: Tensor) -> Tensor:
    return a_AD.new_empty(ends_E.shape[0], grad_AN.shape[1], a_AD.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_AN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a_AD, b_EDN, ends_E = ctx.saved_tensors
    grad_a = _grouped_mm(grad_AN, b_EDN.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    grad_b = _grouped_mm_weight_grad(grad_AN, a_AD, ends_E) if ctx.needs_input_grad[1] else None
    return grad_a, None if grad_b is None else grad_b.transpose(1, 2), None


_grouped_mm.register_autograd(_backward, setup_context=_save)


def _groups(ends_E: Tensor) -> Iterator[slice]:
    """Yield every expert's rows, on the host."""
    first = 0
    for last in ends_E.tolist():
        yield slice(first, last)
        first = last


def _native(a: Tensor, b: Tensor) -> bool:
    """Return whether torch's grouped_mm takes these operands: not empty, and aligned to 16 bytes."""
    if a.numel() == 0 or b.numel() == 0 or not (_aligned(a) and _aligned(b)):
        return False
    return _native_on(a.device, a.dtype)


def _aligned(x: Tensor) -> bool:
    """Return whether one stride is 1 and the others are multiples of 16 bytes, as tensor core kernels require."""
    if x.stride(-1) != 1 and x.stride(-2) != 1:
        return False
    unit = 16 // x.element_size()
    inner = -1 if x.stride(-1) == 1 else -2
    strides = [stride for dim, stride in enumerate(x.stride()) if dim != x.dim() + inner]
    return x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in strides)


@cache
def _native_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch has grouped_mm for the device and dtype. Tried once, because versions differ."""
    if not hasattr(torch, "_grouped_mm"):
        return False
    a, b = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(2, 16, 16, device=device, dtype=dtype)
    ends = torch.tensor([8, 16], device=device, dtype=torch.int32)
    try:
        torch._grouped_mm(a, b.transpose(1, 2), offs=ends)
        torch._grouped_mm(a.t(), a, offs=ends)
    except torch.OutOfMemoryError:  # says nothing about the kernel, and must not be remembered
        raise
    except RuntimeError:
        return False
    return True

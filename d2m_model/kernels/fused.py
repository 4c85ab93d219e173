"""The routed experts of a MoE FFN through Triton, with gradients: operators that torch.compile traces whole.

`up_rows` gathers tokens, multiplies by W1, and weighs gelu_tanh by the gate, in one pass; `down_rows` multiplies by W2
and writes each row to its token's place; `sum_rows` adds a token's rows in float32. Nothing is read back by the host,
and weights are strided views of the fused FLUX weights, never copied.

Shapes: T tokens, H hidden size, E experts, F expert width, A assignments sorted by expert, then by token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .programs import (
    E4M3,
    E5M2,
    GELU_GATE,
    PLAIN,
    WIDE,
    gated_gelu_backward,
    grouped_product,
    grouped_weight_gradient,
    sum_token_rows,
)


class TileSizes(NamedTuple):
    """Tile sizes of a program: rows, columns and depth, and how it is scheduled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def product_blocks(rows: int, experts: int, itemsize: int) -> TileSizes:
    """Tile sizes of `grouped_product`. Two operand tiles of three stages fit in 99 KiB, what a consumer GPU has."""
    per_expert = rows / max(1, experts)
    depth = 64 if itemsize == 2 else 32
    if per_expert <= 32:
        return TileSizes(32, 64, depth, 4, 4 if itemsize == 2 else 3)
    if per_expert <= 128:
        return TileSizes(64, 128, depth, 4, 3)
    return TileSizes(128, 128, depth, 8, 3)


GRADIENT_BLOCKS = TileSizes(
    rows=32, columns=128, depth=64, warps=8, stages=3
)  # rows: of a step; depth: rows of the result


_FORMATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def _product(
    a: Tensor,
    in_row_A: Tensor | None,
    b: Tensor,
    b_strides: tuple[int, int, int],
    columns: int,
    ends_E: Tensor,
    *,
    rows: int,
    scale_EN: Tensor | None = None,
    out_row_A: Tensor | None = None,
    bias_EF: Tensor | None = None,
    gate_A: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """(result [A, N], product + bias before the GELU if `keep`). b is read as [e, k, n] by `b_strides`."""
    if a.stride(-1) != 1:
        a = a.contiguous()
    number_format = _FORMATS.get(b.dtype, WIDE)
    if (number_format is WIDE) != (scale_EN is None):
        raise ValueError(f"The experts' weights are {b.dtype}; expected a scale for float8, and none otherwise.")
    if number_format is not WIDE:
        b = b.view(torch.uint8)
    experts = ends_E.shape[0]
    out = a.new_empty(rows, columns)
    before = a.new_empty(rows if keep else 0, columns)
    if rows == 0:
        return out, before
    blocks = product_blocks(rows, experts, a.element_size())
    row_tiles = triton.cdiv(rows, blocks.rows) + experts  # at most: every expert may end in a tile of its own
    grouped_product[(row_tiles * triton.cdiv(columns, blocks.columns),)](
        a,
        a if in_row_A is None else in_row_A,
        b,
        ends_E if scale_EN is None else scale_EN,
        b if bias_EF is None else bias_EF,
        ends_E if gate_A is None else gate_A,
        before,
        out,
        ends_E if out_row_A is None else out_row_A,
        ends_E,
        a.shape[-1],
        columns,
        a.stride(0),
        *b_strides,
        *((0, 0) if scale_EN is None else scale_EN.stride()),
        *((0, 0) if bias_EF is None else bias_EF.stride()),
        out.stride(0),
        EXPERTS=experts,
        EXPERTS_PADDED=triton.next_power_of_2(experts),
        GATHER=in_row_A is not None,
        SCATTER=out_row_A is not None,
        FORMAT=number_format.value,
        EPILOGUE=(PLAIN if bias_EF is None else GELU_GATE).value,
        KEEP=keep,
        BLOCK_A=blocks.rows,
        BLOCK_N=blocks.columns,
        BLOCK_K=blocks.depth,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out, before


def _weight_gradient(
    a: Tensor, a_row_A: Tensor | None, b: Tensor, b_row_A: Tensor | None, ends_E: Tensor, *, sums: bool = False
) -> tuple[Tensor, Tensor]:
    """([E, M, N], [E, M]): a^T b of every expert's rows, and, if asked for, the sums of a's rows."""
    a, b = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (a, b))
    experts, (m, n) = ends_E.shape[0], (a.shape[1], b.shape[1])
    out, total = a.new_empty(experts, m, n), a.new_empty(experts, m if sums else 0)
    blocks = GRADIENT_BLOCKS
    grouped_weight_gradient[(triton.cdiv(m, blocks.depth) * triton.cdiv(n, blocks.columns), experts)](
        a,
        ends_E if a_row_A is None else a_row_A,
        b,
        ends_E if b_row_A is None else b_row_A,
        out,
        total,
        ends_E,
        m,
        n,
        a.stride(0),
        b.stride(0),
        GATHER_A=a_row_A is not None,
        GATHER_B=b_row_A is not None,
        SUM=sums,
        BLOCK_M=blocks.depth,
        BLOCK_N=blocks.columns,
        BLOCK_A=blocks.rows,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out, total


def _sum_token_rows(y_AH: Tensor, first_T: Tensor | None, tokens: int) -> Tensor:
    """[T, H] from rows in the order of tokens; see `sum_token_rows`. Without first_T every token has as many rows."""
    rows, hidden_size = y_AH.shape
    out = y_AH.new_empty(tokens, hidden_size)
    if tokens:
        block = min(1024, triton.next_power_of_2(hidden_size))
        sum_token_rows[(tokens, triton.cdiv(hidden_size, block))](
            y_AH,
            y_AH if first_T is None else first_T,
            out,
            rows,
            tokens,
            hidden_size,
            TOP_K=rows // tokens if first_T is None else -1,
            BLOCK_H=block,
        )
    return out


# W1's side


@torch.library.custom_op("d2m::up_rows", mutates_args=())
def up_rows(
    x_TH: Tensor,
    token_A: Tensor,
    slot_A: Tensor,
    first_T: Tensor | None,
    gate_A: Tensor,
    ends_E: Tensor,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    keep: bool,
    scale_EF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(gate gelu_tanh(W1 x + b1) [A, F], W1 x + b1 [A, F] if `keep`, for the backward pass; otherwise no rows).

    Row a is of token token_A[a]; among the rows in the order of tokens its place is slot_A[a], and token t's begin at
    first_T[t] (None: all tokens have as many). Expert e's rows end at ends_E[e], int32. x, W1 and b1 have one dtype,
    gate_A is float32. W1 may be float8 instead, with scale_EF, float32, by which its rows are multiplied; it then has no
    gradients.
    """
    strides = (up_EFH.stride(0), up_EFH.stride(2), up_EFH.stride(1))
    rows, width = token_A.shape[0], up_EFH.shape[1]
    return _product(
        x_TH, token_A, up_EFH, strides, width, ends_E, rows=rows, scale_EN=scale_EF, bias_EF=up_bias_EF, gate_A=gate_A,
        keep=keep,
    )  # fmt: skip


@up_rows.register_fake
def _(
    x_TH: Tensor,
    token_A: Tensor,
    slot_A: Tensor,
    first_T: Tensor | None,
    gate_A: Tensor,
    ends_E: Tensor,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    keep: bool,
    scale_EF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, width = token_A.shape[0], up_EFH.shape[1]
    return x_TH.new_empty(rows, width), x_TH.new_empty(rows if keep else 0, width)


@torch.library.custom_op("d2m::up_rows_backward", mutates_args=())
def _up_rows_backward(
    grad_AF: Tensor,
    before_AF: Tensor,
    x_TH: Tensor,
    token_A: Tensor,
    slot_A: Tensor,
    first_T: Tensor | None,
    gate_A: Tensor,
    ends_E: Tensor,
    up_EFH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [T, H], gate_A [A], W1 [E, F, H] and b1 [E, F]."""
    rows, width = before_AF.shape
    grad_before_AF, grad_gate_A = torch.empty_like(before_AF), torch.empty_like(gate_A)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        gated_gelu_backward[(rows,)](
            grad_AF.contiguous(), before_AF, gate_A, grad_before_AF, grad_gate_A, width, BLOCK_F=block
        )
    strides = (up_EFH.stride(0), up_EFH.stride(1), up_EFH.stride(2))
    grad_x_AH, _ = _product(grad_before_AF, None, up_EFH, strides, up_EFH.shape[2], ends_E, rows=rows, out_row_A=slot_A)
    grad_x_TH = _sum_token_rows(grad_x_AH, first_T, x_TH.shape[0])
    return grad_x_TH, grad_gate_A, *_weight_gradient(grad_before_AF, None, x_TH, token_A, ends_E, sums=True)


@_up_rows_backward.register_fake
def _(
    grad_AF: Tensor,
    before_AF: Tensor,
    x_TH: Tensor,
    token_A: Tensor,
    slot_A: Tensor,
    first_T: Tensor | None,
    gate_A: Tensor,
    ends_E: Tensor,
    up_EFH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, width, hidden_size = up_EFH.shape
    return (
        x_TH.new_empty(x_TH.shape),
        torch.empty_like(gate_A),
        x_TH.new_empty(experts, width, hidden_size),
        x_TH.new_empty(experts, width),
    )


def _save_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TH, token_A, slot_A, first_T, gate_A, ends_E, up_EFH, _, keep, scale_EF = inputs
    if not keep or scale_EF is not None:
        raise RuntimeError(
            "up_rows was called without `keep`, or in float8; its gradients need the first and not the other."
        )
    ctx.save_for_backward(output[1], x_TH, token_A, slot_A, first_T, gate_A, ends_E, up_EFH)


def _up_backward(ctx: Any, grad_AF: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_gate, grad_up, grad_bias = _up_rows_backward(grad_AF, *ctx.saved_tensors)
    return grad_x, None, None, None, grad_gate, None, grad_up, grad_bias, None, None


up_rows.register_autograd(_up_backward, setup_context=_save_up)


# W2's side


@torch.library.custom_op("d2m::down_rows", mutates_args=())
def down_rows(
    hidden_AF: Tensor, slot_A: Tensor, ends_E: Tensor, down_HEF: Tensor, scale_H: Tensor | None = None
) -> Tensor:
    """W2 hidden of every row, [A, H], each written to its place slot_A[a] among the rows in the order of tokens.

    scale_H is for W2 in float8, as in `up_rows`.
    """
    scale_EH = None if scale_H is None else scale_H.expand(ends_E.shape[0], -1)
    strides = (down_HEF.stride(1), down_HEF.stride(2), down_HEF.stride(0))
    rows = hidden_AF.shape[0]
    out, _ = _product(
        hidden_AF, None, down_HEF, strides, down_HEF.shape[0], ends_E, rows=rows, scale_EN=scale_EH, out_row_A=slot_A
    )
    return out


@down_rows.register_fake
def _(hidden_AF: Tensor, slot_A: Tensor, ends_E: Tensor, down_HEF: Tensor, scale_H: Tensor | None = None) -> Tensor:
    return hidden_AF.new_empty(hidden_AF.shape[0], down_HEF.shape[0])


@torch.library.custom_op("d2m::down_rows_backward", mutates_args=())
def _down_rows_backward(
    grad_AH: Tensor, hidden_AF: Tensor, slot_A: Tensor, ends_E: Tensor, down_HEF: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [A, F] and of W2, as [E, H, F]."""
    strides = (down_HEF.stride(1), down_HEF.stride(0), down_HEF.stride(2))
    rows, width = hidden_AF.shape
    grad_hidden_AF, _ = _product(grad_AH, slot_A, down_HEF, strides, width, ends_E, rows=rows)
    grad_down_EHF, _ = _weight_gradient(grad_AH, slot_A, hidden_AF, None, ends_E)
    return grad_hidden_AF, grad_down_EHF


@_down_rows_backward.register_fake
def _(grad_AH: Tensor, hidden_AF: Tensor, slot_A: Tensor, ends_E: Tensor, down_HEF: Tensor) -> tuple[Tensor, Tensor]:
    hidden_size, experts, width = down_HEF.shape
    return hidden_AF.new_empty(hidden_AF.shape), hidden_AF.new_empty(experts, hidden_size, width)


def _save_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale_H = inputs
    if scale_H is not None:
        raise RuntimeError("down_rows was called with weights in float8, which have no gradients.")
    ctx.save_for_backward(*tensors)


def _down_backward(ctx: Any, grad_AH: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden_AF, grad_down_EHF = _down_rows_backward(grad_AH, *ctx.saved_tensors)
    return grad_hidden_AF, None, None, grad_down_EHF.transpose(0, 1), None


down_rows.register_autograd(_down_backward, setup_context=_save_down)


# A token's rows


@torch.library.custom_op("d2m::sum_rows", mutates_args=())
def sum_rows(y_AH: Tensor, token_A: Tensor, slot_A: Tensor, first_T: Tensor | None, tokens: int) -> Tensor:
    """[T, H]: the sum of each token's rows, which lie in the order of tokens; in float32, rounded once.

    Slot slot_A[a] is of token token_A[a]; both are for the gradient.
    """
    return _sum_token_rows(y_AH, first_T, tokens)


@sum_rows.register_fake
def _(y_AH: Tensor, token_A: Tensor, slot_A: Tensor, first_T: Tensor | None, tokens: int) -> Tensor:
    return y_AH.new_empty(tokens, y_AH.shape[1])


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _sum_backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
    token_A, slot_A = ctx.saved_tensors
    token_by_slot_A = torch.empty_like(token_A).scatter(0, slot_A, token_A)
    return grad_TH.index_select(0, token_by_slot_A), None, None, None, None


sum_rows.register_autograd(_sum_backward, setup_context=_save_sum)

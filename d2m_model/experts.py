"""The routed experts of a MoE FFN (Eq. 2): the one seam between the method and its kernels.

`plan_dispatch` sorts token-expert assignments by expert. `expert_up` and `expert_down` are the two halves of
the experts' MLPs; they are apart because FLUX's single block keeps W1 and W2 in two modules. Everything runs
on strided views of the fused weights, with static shapes and no word from the device back to the host. (An uneven
routing in several chunks is the exception: the host must know where in its rows the chunks begin.)

Shapes: T tokens, H hidden size, E experts, F expert width, K top_k, A assignments (T K of them under top-k), C chunks;
in `grouped_mm` A rows, D depth of the product, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.choice import has_kernels
from .routers import Routing

# Gathered rows of one chunk. A CPU wants them in its cache; a GPU only wants its memory bounded.
CHUNK_BYTES_CPU = 20 * 2**20
CHUNK_BYTES_GPU = 512 * 2**20


@dataclass(kw_only=True, slots=True)
class Dispatch:
    """Assignments sorted by chunk of tokens, then by expert, then by token: what the two halves agree on.

    Row a stands for token token_A[a] at expert expert_A[a] with weight gate_A[a]. row_TK leads back: the row of a
    token's k-th choice. Where tokens differ in their number of experts it is flat, [A], and token t's rows begin at
    row_TK[first_T[t]]. Chunk c begins at row chunk_rows[c] (the last entry is A); in it expert e's rows end at
    ends_CE[c, e]. `fused`: Triton kernels compute both halves, and the first of them applies the gates.
    """

    tokens: int
    token_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    row_TK: Tensor
    first_T: Tensor | None
    ends_CE: Tensor
    chunk_tokens: int
    chunk_rows: list[int]
    fused: bool = False

    def chunks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Of every chunk its tokens, its rows and its ends_E. There is one at least, if without rows: so weights that
        nothing was routed to get gradients, of zero, on every rank alike."""
        last = self.ends_CE.shape[0] - 1
        for chunk, ends_E in enumerate(self.ends_CE.unbind()):
            first = chunk * self.chunk_tokens
            tokens = slice(first, self.tokens if chunk == last else first + self.chunk_tokens)
            yield tokens, slice(self.chunk_rows[chunk], self.chunk_rows[chunk + 1]), ends_E

    def links(self, tokens: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """token_A, row_TK and first_T of a chunk, counted from its first token and its first row."""
        token_A = self.token_A[rows] - tokens.start
        if self.first_T is None:
            return token_A, self.row_TK[tokens] - rows.start, None
        return token_A, self.row_TK[rows] - rows.start, self.first_T[tokens] - rows.start


def plan_dispatch(routing: Routing, x_TH: Tensor, chunk_tokens: int | None = None) -> Dispatch:
    """Sort the assignments of `routing`. Of x only shape, dtype and device are read, to size the chunks.

    `chunk_tokens` bounds the tokens of one chunk; None chooses. Results do not depend on it beyond rounding.
    """
    tokens, experts = routing.logits_TE.shape
    top_k, rows = routing.per_token, routing.token_A.shape[0]
    per_token = float(top_k) if top_k is not None else rows / max(1, tokens)
    if chunk_tokens is None:
        budget = CHUNK_BYTES_CPU if x_TH.is_cpu else CHUNK_BYTES_GPU
        chunk_tokens = max(1, int(budget / (max(1, per_token) * x_TH.shape[1] * x_TH.element_size())))
    # Equal chunks, instead of a small last one. The first case keeps a compiled graph good for any T.
    chunks = 1 if tokens <= chunk_tokens else -(-tokens // chunk_tokens)
    chunk_tokens = max(1, -(-tokens // chunks))

    row_A = torch.arange(rows, device=routing.logits_TE.device)
    token_A, expert_A = routing.token_A, routing.expert_A
    if top_k is not None:
        first_T = None
        chunk_rows = [chunk * chunk_tokens * top_k for chunk in range(chunks)]
    else:
        first_T = torch.searchsorted(token_A, torch.arange(tokens, device=token_A.device))
        chunk_rows = [0] if chunks == 1 else first_T[::chunk_tokens].tolist()

    key_A, order_A = (token_A // chunk_tokens * experts + expert_A).sort(stable=True)
    ends = torch.searchsorted(key_A, torch.arange(chunks * experts, device=key_A.device), right=True)
    ends_CE = ends.view(chunks, experts)
    if chunks > 1:
        ends_CE = ends_CE - F.pad(ends_CE[:-1, -1:], (0, 0, 1, 0))
    back_A = torch.empty_like(order_A).scatter(0, order_A, row_A)
    return Dispatch(
        tokens=tokens,
        token_A=token_A.index_select(0, order_A),
        expert_A=expert_A.index_select(0, order_A),
        gate_A=routing.gate_A.index_select(0, order_A),
        row_TK=back_A if top_k is None else back_A.view(tokens, top_k),
        first_T=first_T,
        ends_CE=ends_CE.to(torch.int32),
        chunk_tokens=chunk_tokens,
        chunk_rows=[*chunk_rows, rows],
        fused=has_kernels(x_TH),
    )


def expert_up(x_TH: Tensor, plan: Dispatch, up_EFH: Tensor, up_bias_EF: Tensor) -> Tensor:
    """gelu_tanh(W1 x + b1) of every token at its experts: hidden_AF [A, F], in the plan's order (Eq. 1)."""
    if plan.fused:
        return _fused_up(x_TH, plan, up_EFH, up_bias_EF)
    hidden = []
    for tokens, rows, ends_E in plan.chunks():
        # Gathered from the chunk, so that the gradient is summed chunk by chunk too.
        x_AH = _TakeRows.apply(x_TH[tokens], *plan.links(tokens, rows))
        pre_AF = grouped_mm(x_AH, up_EFH.transpose(1, 2), ends_E)
        bias_AF = up_bias_EF.to(pre_AF.dtype).index_select(0, plan.expert_A[rows])
        hidden.append(F.gelu(pre_AF + bias_AF, approximate="tanh"))
    return _joined(hidden)


def expert_down(hidden_AF: Tensor, plan: Dispatch, down_HEF: Tensor) -> Tensor:
    """sum over a token's experts of g_i W2_i hidden: y_TH [T, H] (Eq. 2, second term). Zeros for a token without any.

    The gates weigh the narrow hidden activation; a token's rows are summed in float32 and rounded once.
    """
    if plan.fused:
        return _fused_down(hidden_AF, plan, down_HEF)
    y = []
    for tokens, rows, ends_E in plan.chunks():
        weighted_AF = hidden_AF[rows] * plan.gate_A[rows, None].to(hidden_AF.dtype)
        y_AH = grouped_mm(weighted_AF, down_HEF.permute(1, 2, 0), ends_E)
        y.append(_SumRows.apply(y_AH, *plan.links(tokens, rows)))
    return _joined(y)


def mean_compensation(routing: Routing, expert_mean_EH: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands in for the experts not chosen: sum of mu_e - sum over the chosen of g_e mu_e, [T, H].

    So shared + sum mu + sum over the chosen g_e (E_e(x) - mu_e) is shared + routed + this. Exactly zero
    where every expert is chosen in gate mode `sum`.
    """
    return (1 - routing.gates_TE).to(dtype) @ expert_mean_EH.to(dtype)


def _fused_up(x_TH: Tensor, plan: Dispatch, up_EFH: Tensor, up_bias_EF: Tensor) -> Tensor:
    """gate * gelu_tanh(W1 x + b1), by kernels/fused.py."""
    from .kernels.fused import up_rows

    x_TH, up_EFH, up_bias_EF = _autocast(x_TH, up_EFH, up_bias_EF)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TH, plan.gate_A, up_EFH, up_bias_EF))
    hidden = []
    for tokens, rows, ends_E in plan.chunks():
        token_A, row_TK, first_T = plan.links(tokens, rows)
        gate_A, slot_A = plan.gate_A[rows], _inverse(row_TK)
        chunk_AF, _ = up_rows(x_TH[tokens], token_A, slot_A, first_T, gate_A, ends_E, up_EFH, up_bias_EF, keep)
        hidden.append(chunk_AF)
    return _joined(hidden)


def _fused_down(weighted_AF: Tensor, plan: Dispatch, down_HEF: Tensor) -> Tensor:
    """Sum over a token's experts of W2 times the weighted hidden activation, by kernels/fused.py."""
    from .kernels.fused import down_rows, sum_rows

    weighted_AF, down_HEF = _autocast(weighted_AF, down_HEF)
    y = []
    for tokens, rows, ends_E in plan.chunks():
        token_A, row_TK, first_T = plan.links(tokens, rows)
        y_AH = down_rows(weighted_AF[rows], _inverse(row_TK), ends_E, down_HEF)
        y.append(sum_rows(y_AH, token_A, row_TK.flatten(), first_T, tokens.stop - tokens.start))
    return _joined(y)


def _inverse(row_TK: Tensor) -> Tensor:
    """Slot of each row, int64 [A]: where it stands in the order of tokens."""
    row_A = row_TK.flatten()
    return torch.empty_like(row_A).scatter(0, row_A, torch.arange(row_A.shape[0], device=row_A.device))


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where autocast is on, otherwise as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


class _TakeRows(torch.autograd.Function):
    """x_AH = x_TH[token_A]. Its gradient is `_SumRows`: summed in float32, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, token_A: Tensor, row_TK: Tensor, first_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_A, row_TK, first_T)
        return x_TH.index_select(0, token_A)

    @staticmethod
    def backward(ctx: Any, grad_AH: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_rows(grad_AH, *ctx.saved_tensors), None, None, None


class _SumRows(torch.autograd.Function):
    """y_TH = sum over a token's rows of y_AH[row_TK]. Its gradient is `_TakeRows`."""

    @staticmethod
    def forward(ctx: Any, y_AH: Tensor, token_A: Tensor, row_TK: Tensor, first_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_A)
        return _sum_rows(y_AH, token_A, row_TK, first_T)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, None]:
        (token_A,) = ctx.saved_tensors
        return grad_TH.index_select(0, token_A), None, None, None


def _sum_rows(y_AH: Tensor, token_A: Tensor, row_TK: Tensor, first_T: Tensor | None) -> Tensor:
    if y_AH.shape[0] == 0:  # of no token of the chunk
        return y_AH.new_zeros((row_TK if first_T is None else first_T).shape[0], y_AH.shape[1])
    if y_AH.is_cpu or y_AH.is_cuda:  # gather and sum in one pass
        return F.embedding_bag(row_TK, y_AH, first_T, mode="sum")
    if first_T is None:
        return y_AH.index_select(0, row_TK.flatten()).unflatten(0, row_TK.shape).sum(dim=1)
    return _add_rows(y_AH, token_A, first_T.shape[0])


def _add_rows(y_AH: Tensor, token_A: Tensor, tokens: int) -> Tensor:
    """`_sum_rows` for devices that may lack bags of different sizes; some of them add in no fixed order."""
    sum_TH = y_AH.new_zeros(tokens, y_AH.shape[1], dtype=torch.float32)
    return sum_TH.index_add(0, token_A, y_AH.float()).to(y_AH.dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# Grouped matrix product


def grouped_mm(a_AD: Tensor, b_EDN: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends_E[e-1] ... ends_E[e] of a, times b[e]: [A, N]. Kernels are exchanged here.

    ends_E is int32, does not fall, and ends at A. a and b are of one dtype, except under autocast.
    """
    a_AD, b_EDN = _autocast(a_AD, b_EDN)
    return _grouped_mm(a_AD, b_EDN, ends_E)


# A custom operator, because torch traces its own grouped_mm for bfloat16 only, and because the loop over
# experts reads ends_E on the host, which a graph could not.
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
    """d loss / d b, as [E, N, D]: the layout of an nn.Linear's weight."""
    if _native(grad_AN.t(), a_AD):
        grad_END = torch._grouped_mm(grad_AN.t(), a_AD, offs=ends_E)
        # Kernels of some GPUs leave the gradient of an expert without rows unwritten (pytorch issue 172439).
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
    """Every expert's rows, on the host."""
    first = 0
    for last in ends_E.tolist():
        yield slice(first, last)
        first = last


def _native(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped_mm takes these operands. It wants some rows, and everything aligned to 16 bytes."""
    if a.numel() == 0 or b.numel() == 0 or not (_aligned(a) and _aligned(b)):
        return False
    return _native_on(a.device, a.dtype)


def _aligned(x: Tensor) -> bool:
    """One stride is 1, and everything else is a multiple of 16 bytes: the terms of the tensor core kernels."""
    if x.stride(-1) != 1 and x.stride(-2) != 1:
        return False
    unit = 16 // x.element_size()
    inner = -1 if x.stride(-1) == 1 else -2
    strides = [stride for dim, stride in enumerate(x.stride()) if dim != x.dim() + inner]
    return x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in strides)


@cache
def _native_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has grouped_mm for the device and dtype: tried once, since versions differ."""
    if not hasattr(torch, "_grouped_mm"):
        return False
    a, b = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(2, 16, 16, device=device, dtype=dtype)
    ends = torch.tensor([8, 16], device=device, dtype=torch.int32)
    try:
        torch._grouped_mm(a, b.transpose(1, 2), offs=ends)
        torch._grouped_mm(a.t(), a, offs=ends)
    except torch.OutOfMemoryError:  # says nothing about the kernel, and must not be remembered
        raise
    except (RuntimeError, NotImplementedError):
        return False
    return True

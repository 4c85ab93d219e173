"""Routed experts of a MoE FFN (Eq. 2): the seam between the method and its kernels.

`plan_dispatch` sorts the assignments of tokens to experts by expert; `plan_experts` does so too, unless computing every
expert for every token is cheaper. `expert_up` and `expert_down` are the two halves of the experts' MLPs; they are
separate because FLUX's single block keeps W1 and W2 in two modules. Everything runs on strided views of the fused
weights, with static shapes. The host waits for a GPU in two cases only: for an uneven routing in several chunks, if it does
not know at which rows they begin (in training), and for each product where neither our Triton kernels nor torch's fused
product run (float32, and compute capabilities before 8.0).

Shapes: T tokens, H hidden size, E experts, F expert width, K top_k, A assignments (T K of them under top-k), C chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.choice import computes_every_expert, has_kernels
from .kernels.grouped_mm import cast_for_autocast, grouped_mm
from .routers import Routing

# Bytes of the gathered rows of one chunk. On a CPU they should fit into its cache. On a GPU they bound the memory: with
# twice the bytes of x, the FFN needs less than the dense one, by which ComfyUI estimates the memory of a FLUX. Below
# CHUNK_BYTES_GPU nothing is gained.
CHUNK_BYTES_CPU = 20 * 2**20
CHUNK_BYTES_GPU = 32 * 2**20


@dataclass(kw_only=True, slots=True)
class Dispatch:
    """Dispatch of tokens to experts: assignments sorted by chunk of tokens, then by expert, then by token.

    Row a is token token_A[a] at expert expert_A[a] with weight gate_A[a]; it is assignment slot_A[a] in the order of
    tokens. Where tokens differ in their number of experts, token t's assignments begin at first_T[t]; otherwise it is
    None. Chunk c begins at row chunk_rows[c] (the last entry is A); in it expert e's rows end at ends_CE[c, e]. `fused`:
    Triton kernels compute both halves, and the first of them applies the gates.
    """

    tokens: int
    token_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    slot_A: Tensor
    first_T: Tensor | None
    ends_CE: Tensor
    chunk_tokens: int
    chunk_rows: list[int]
    fused: bool = False

    def chunks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (tokens, rows, ends_E) per chunk.

        There is always at least one chunk, so that unused experts still get zero gradients on every rank.
        """
        last = self.ends_CE.shape[0] - 1
        for chunk, ends_E in enumerate(self.ends_CE.unbind()):
            first = chunk * self.chunk_tokens
            tokens = slice(first, self.tokens if chunk == last else first + self.chunk_tokens)
            yield tokens, slice(self.chunk_rows[chunk], self.chunk_rows[chunk + 1]), ends_E

    def links(self, tokens: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return token_A, slot_A and first_T of a chunk, relative to its first token and its first row."""
        first_T = None if self.first_T is None else self.first_T[tokens] - rows.start
        return self.token_A[rows] - tokens.start, self.slot_A[rows] - rows.start, first_T


@dataclass(kw_only=True, slots=True)
class EveryExpert:
    """Every expert is computed for every token in one product; the gates, float32, are zero where it is not chosen."""

    gates_TE: Tensor


def plan_experts(routing: Routing, x_TH: Tensor, width: int, chunk_tokens: int | None = None) -> Dispatch | EveryExpert:
    """Choose the cheaper way for experts of `width` neurons. `chunk_tokens` is that of `plan_dispatch`."""
    if computes_every_expert(x_TH, routing.token_A.shape[0], routing.logits_TE.shape[1], width):
        return EveryExpert(gates_TE=routing.gates_TE)
    return plan_dispatch(routing, x_TH, chunk_tokens)


def plan_dispatch(routing: Routing, x_TH: Tensor, chunk_tokens: int | None = None) -> Dispatch:
    """Sort the assignments of `routing`. Only shape, dtype and device of x are used, to size the chunks.

    `chunk_tokens` is the largest number of tokens in a chunk; None chooses it. Results depend on it only by rounding.
    """
    tokens, experts = routing.logits_TE.shape
    top_k, rows = routing.per_token, routing.token_A.shape[0]
    per_token = float(top_k) if top_k is not None else rows / max(1, tokens)
    if chunk_tokens is None:
        budget = CHUNK_BYTES_CPU if x_TH.is_cpu else max(CHUNK_BYTES_GPU, 2 * x_TH.nbytes)
        chunk_tokens = max(1, int(budget / (max(1, per_token) * x_TH.shape[1] * x_TH.element_size())))
    # Equal chunks, without a small last one. The first case keeps a compiled graph valid for any T.
    chunks = 1 if tokens <= chunk_tokens else -(-tokens // chunk_tokens)
    chunk_tokens = max(1, -(-tokens // chunks))

    token_A, expert_A = routing.token_A, routing.expert_A
    if top_k is not None:
        first_T = None
        chunk_rows = [chunk * chunk_tokens * top_k for chunk in range(chunks)]
    else:
        first_T = torch.searchsorted(token_A, torch.arange(tokens, device=token_A.device))
        if chunks == 1:
            chunk_rows = [0]
        elif routing.ends_T is not None:
            chunk_rows = [0, *routing.ends_T[chunk_tokens - 1 : tokens - 1 : chunk_tokens].tolist()]
        else:
            chunk_rows = first_T[::chunk_tokens].tolist()

    if routing.rows is not None and chunks == 1:
        sorted_token_A, order_A, ends_E = routing.rows
        ends_CE = ends_E[None]
    else:
        key_A, order_A = (token_A // chunk_tokens * experts + expert_A).sort(stable=True)
        ends = torch.searchsorted(key_A, torch.arange(chunks * experts, device=key_A.device), right=True)
        ends_CE = ends.view(chunks, experts)
        if chunks > 1:
            ends_CE = ends_CE - F.pad(ends_CE[:-1, -1:], (0, 0, 1, 0))
        sorted_token_A = token_A.index_select(0, order_A)
    return Dispatch(
        tokens=tokens,
        token_A=sorted_token_A,
        expert_A=expert_A.index_select(0, order_A),
        gate_A=routing.gate_A.index_select(0, order_A),
        slot_A=order_A,
        first_T=first_T,
        ends_CE=ends_CE.to(torch.int32),
        chunk_tokens=chunk_tokens,
        chunk_rows=[*chunk_rows, rows],
        fused=has_kernels(x_TH),
    )


def expert_up(
    x_TH: Tensor, plan: Dispatch | EveryExpert, up_EFH: Tensor, up_bias_EF: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Return gelu_tanh(W1 x + b1) of every token at its experts: [A, F], in the plan's order (Eq. 1).

    [T, E F], with the gates already applied, if the plan computes every expert. W1 may be float8 if Triton kernels
    compute it (`plan.fused`); `scale`, one float32 number, then multiplies it.
    """
    if isinstance(plan, EveryExpert):
        hidden_TN = F.gelu(F.linear(x_TH, up_EFH.flatten(0, 1), up_bias_EF.flatten()), approximate="tanh")
        hidden_TEF = hidden_TN.unflatten(1, up_bias_EF.shape)
        return (hidden_TEF * plan.gates_TE.to(hidden_TEF.dtype).unsqueeze(2)).flatten(1)
    if plan.fused:
        return _fused_up(x_TH, plan, up_EFH, up_bias_EF, scale)
    hidden = []
    for tokens, rows, ends_E in plan.chunks():
        # Gather from the chunk, so that the gradient is summed chunk by chunk as well. The rows of H values have no name:
        # those of one chunk would live on while the next one's are gathered.
        token_A, slot_A, first_T = plan.links(tokens, rows)
        pre_AF = grouped_mm(
            _TakeRows.apply(x_TH[tokens], token_A, slot_A, first_T), up_EFH.transpose(1, 2), ends_E
        )  # fmt: skip
        pre_AF = pre_AF + up_bias_EF.to(pre_AF.dtype).index_select(0, plan.expert_A[rows])
        hidden.append(F.gelu(pre_AF, approximate="tanh"))
    return _joined(hidden)


def expert_down(
    hidden_AF: Tensor, plan: Dispatch | EveryExpert, down_HEF: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Return the sum over each token's experts of g_i W2_i hidden: [T, H] (Eq. 2, second term); zeros without experts.

    Gates multiply the narrow hidden activation. A token's rows are summed in float32 and rounded once. `scale` is for W2
    in float8, as in `expert_up`.
    """
    if isinstance(plan, EveryExpert):
        return F.linear(hidden_AF, down_HEF.flatten(1))
    if plan.fused:
        return _fused_down(hidden_AF, plan, down_HEF, scale)
    y = []
    for tokens, rows, ends_E in plan.chunks():
        weighted_AF = hidden_AF[rows] * plan.gate_A[rows, None].to(hidden_AF.dtype)
        token_A, slot_A, first_T = plan.links(tokens, rows)
        count = tokens.stop - tokens.start
        y.append(
            _SumRows.apply(
                grouped_mm(weighted_AF, down_HEF.permute(1, 2, 0), ends_E), token_A, slot_A, first_T, count
            )
        )  # fmt: skip
    return _joined(y)


def mean_compensation(routing: Routing, expert_mean_EH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of mu_e over all experts less the sum of g_e mu_e over the chosen ones, [T, H].

    Added to the routed experts it replaces every expert that is not chosen by its mean output. It is exactly zero where
    every expert is chosen in gate mode `sum`.
    """
    return (1 - routing.gates_TE).to(dtype) @ expert_mean_EH.to(dtype)


def _fused_up(x_TH: Tensor, plan: Dispatch, up_EFH: Tensor, up_bias_EF: Tensor, scale: Tensor | None) -> Tensor:
    """gate * gelu_tanh(W1 x + b1), by kernels/fused.py."""
    from .kernels.fused import up_rows

    if scale is None:
        x_TH, up_EFH, up_bias_EF = cast_for_autocast(x_TH, up_EFH, up_bias_EF)
    scale_EF = None if scale is None else scale.expand(up_bias_EF.shape)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TH, plan.gate_A, up_EFH, up_bias_EF))
    hidden = []
    for tokens, rows, ends_E in plan.chunks():
        token_A, slot_A, first_T = plan.links(tokens, rows)
        gate_A = plan.gate_A[rows]
        chunk_AF, _ = up_rows(
            x_TH[tokens], token_A, slot_A, first_T, gate_A, ends_E, up_EFH, up_bias_EF, keep, scale_EF
        )
        hidden.append(chunk_AF)
    return _joined(hidden)


def _fused_down(weighted_AF: Tensor, plan: Dispatch, down_HEF: Tensor, scale: Tensor | None) -> Tensor:
    """Sum over a token's experts of W2 times the weighted hidden activation, by kernels/fused.py."""
    from .kernels.fused import down_rows, sum_rows

    if scale is None:
        weighted_AF, down_HEF = cast_for_autocast(weighted_AF, down_HEF)
    scale_H = None if scale is None else scale.expand(down_HEF.shape[0])
    y = []
    for tokens, rows, ends_E in plan.chunks():
        token_A, slot_A, first_T = plan.links(tokens, rows)
        count = tokens.stop - tokens.start
        y.append(
            sum_rows(down_rows(weighted_AF[rows], slot_A, ends_E, down_HEF, scale_H), token_A, slot_A, first_T, count)
        )
    return _joined(y)


def _inverse(slot_A: Tensor) -> Tensor:
    """Return the row of each slot, int64 [A]."""
    return torch.empty_like(slot_A).scatter(0, slot_A, torch.arange(slot_A.shape[0], device=slot_A.device))


class _TakeRows(torch.autograd.Function):
    """x_AH = x_TH[token_A]. The gradient is `_SumRows`: summed in float32, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, token_A: Tensor, slot_A: Tensor, first_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_A, slot_A, first_T)
        ctx.tokens = x_TH.shape[0]
        return x_TH.index_select(0, token_A)

    @staticmethod
    def backward(ctx: Any, grad_AH: Tensor) -> tuple[Tensor, None, None, None]:
        token_A, slot_A, first_T = ctx.saved_tensors
        return _sum_rows(grad_AH, token_A, slot_A, first_T, ctx.tokens), None, None, None


class _SumRows(torch.autograd.Function):
    """y_TH = sum of each token's rows of y_AH. The gradient is `_TakeRows`."""

    @staticmethod
    def forward(ctx: Any, y_AH: Tensor, token_A: Tensor, slot_A: Tensor, first_T: Tensor | None, tokens: int) -> Tensor:
        ctx.save_for_backward(token_A)
        return _sum_rows(y_AH, token_A, slot_A, first_T, tokens)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, None, None]:
        (token_A,) = ctx.saved_tensors
        return grad_TH.index_select(0, token_A), None, None, None, None


def _sum_rows(y_AH: Tensor, token_A: Tensor, slot_A: Tensor, first_T: Tensor | None, tokens: int) -> Tensor:
    if y_AH.shape[0] == 0:  # no token of the chunk has an expert
        return y_AH.new_zeros(tokens, y_AH.shape[1])
    if first_T is not None and not (y_AH.is_cpu or y_AH.is_cuda):
        return _add_rows(y_AH, token_A, tokens)
    row_A = _inverse(slot_A)
    row_TK = row_A if first_T is not None else row_A.view(tokens, -1)
    if y_AH.is_cpu or y_AH.is_cuda:  # gather and sum in one pass
        return F.embedding_bag(row_TK, y_AH, first_T, mode="sum")
    return y_AH.index_select(0, row_A).unflatten(0, row_TK.shape).sum(dim=1)


def _add_rows(y_AH: Tensor, token_A: Tensor, tokens: int) -> Tensor:
    """`_sum_rows` for devices that may lack bags of different sizes. Some of these add in no fixed order."""
    sum_TH = y_AH.new_zeros(tokens, y_AH.shape[1], dtype=torch.float32)
    return sum_TH.index_add(0, token_A, y_AH.float()).to(y_AH.dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

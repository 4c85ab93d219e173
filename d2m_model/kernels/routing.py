"""Top-k routing and the sort by expert in two Triton programs, without gradients: nothing is read back by the host.

Shapes: T tokens, H hidden size, E experts, K top_k, A = T K assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .programs import place_rows, route_tokens

_BLOCK_T = 32


class SortedChoice(NamedTuple):
    """The choice of a top-k router, by token and by expert.

    experts_TK int64 and gates_TK float32 [T, K], best first; logits_TE float32 [T, E]. Row a of those sorted by expert,
    then by token, is of token token_A[a] and stands at slot_A[a] = token K + rank in the order of tokens, both int64.
    Expert e's rows end at ends_E[e], int32.
    """

    experts_TK: Tensor
    gates_TK: Tensor
    logits_TE: Tensor
    token_A: Tensor
    slot_A: Tensor
    ends_E: Tensor


def route_and_sort(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, *, top_k: int, normalised: bool, scale: float
) -> SortedChoice:
    """`routers.top_k.route_top_k` and the sort of its assignments. 0 <= top_k <= E."""
    x_TH, weight_EH = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x_TH, weight_EH))
    tokens, experts = x_TH.shape[0], weight_EH.shape[0]
    blocks, rows = triton.cdiv(tokens, _BLOCK_T), tokens * top_k
    logits_TE = x_TH.new_empty(tokens, experts, dtype=torch.float32)
    gates_TK = x_TH.new_empty(tokens, top_k, dtype=torch.float32)
    experts_TK, token_A, slot_A = x_TH.new_empty(3, rows, dtype=torch.int64).unbind()
    experts_TK = experts_TK.view(tokens, top_k)
    if tokens == 0:
        return SortedChoice(
            experts_TK, gates_TK, logits_TE, token_A, slot_A, slot_A.new_zeros(experts, dtype=torch.int32)
        )
    rank_TE = x_TH.new_empty(tokens, experts, dtype=torch.int8)
    count_CE = x_TH.new_empty(blocks, experts, dtype=torch.int32)
    sizes = {"EXPERTS": experts, "EXPERTS_PADDED": max(16, triton.next_power_of_2(experts)), "BLOCK_T": _BLOCK_T}
    route_tokens[(blocks,)](
        x_TH,
        weight_EH,
        weight_EH if bias_E is None else bias_E,
        logits_TE,
        rank_TE,
        experts_TK,
        gates_TK,
        count_CE,
        tokens,
        x_TH.shape[1],
        top_k,
        scale,
        x_TH.stride(0),
        weight_EH.stride(0),
        **sizes,
        BIAS=bias_E is not None,
        NORMALISED=normalised,
        BLOCK_H=64,
        num_warps=4,
    )
    ends_EC = count_CE.t().reshape(-1).cumsum(0, dtype=torch.int32)
    if rows:
        place_rows[(blocks,)](rank_TE, ends_EC, token_A, slot_A, tokens, blocks, top_k, **sizes, num_warps=4)
    ends_E = ends_EC[blocks - 1 :: blocks].contiguous()
    return SortedChoice(experts_TK, gates_TK, logits_TE, token_A, slot_A, ends_E)

"""Top-k routing and the sort by expert in two Triton programs, for inference: nothing is read back by the host.

Shapes: T tokens, H hidden size, E experts, K top_k, A = T K assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .programs import place_rows, route_tokens

BLOCK_T = 32


@dataclass(kw_only=True, slots=True)
class SortedRouting:
    """The choice of a top-k router, sorted by expert, then by token.

    logits_TE and gates_TE float32 [T, E], gates 0 where an expert is not chosen; rank_TE int8, -1 where it is not
    chosen. Row a is of token_A[a] with weight gate_A[a], and stands at slot_A[a] = token K + rank in the order of
    tokens. Expert e's rows end at ends_E[e], int32.
    """

    logits_TE: Tensor
    gates_TE: Tensor
    rank_TE: Tensor
    token_A: Tensor
    slot_A: Tensor
    gate_A: Tensor
    ends_E: Tensor


def route_and_sort(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    *,
    top_k: int,
    normalised: bool,
    scale: float,
    mask_E: Tensor | None = None,
) -> SortedRouting:
    """`routers.route_top_k` and the sort of its assignments. `mask_E` multiplies the gates of its experts.

    Without gradients: training routes by torch's own operators.
    """
    x_TH, weight_EH = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x_TH, weight_EH))
    tokens, experts = x_TH.shape[0], weight_EH.shape[0]
    blocks = max(1, triton.cdiv(tokens, BLOCK_T))
    logits_TE, gates_TE = x_TH.new_empty(2, tokens, experts, dtype=torch.float32).unbind()
    rank_TE = x_TH.new_empty(tokens, experts, dtype=torch.int8)
    count_CE = x_TH.new_zeros(blocks, experts, dtype=torch.int32)
    padded = max(16, triton.next_power_of_2(experts))
    if tokens:
        route_tokens[(blocks,)](
            x_TH,
            weight_EH,
            weight_EH if bias_E is None else bias_E,
            logits_TE,
            rank_TE,
            gates_TE,
            count_CE,
            tokens,
            x_TH.shape[1],
            top_k,
            scale,
            x_TH.stride(0),
            weight_EH.stride(0),
            EXPERTS=experts,
            EXPERTS_PADDED=padded,
            BIAS=bias_E is not None,
            NORMALISED=normalised,
            BLOCK_T=BLOCK_T,
            BLOCK_H=64,
            num_warps=4,
        )
    if mask_E is not None:
        gates_TE *= mask_E.to(gates_TE)
    ends_EC = count_CE.t().reshape(-1).cumsum(0, dtype=torch.int32)
    rows = tokens * top_k
    token_A, slot_A = x_TH.new_empty(2, rows, dtype=torch.int64).unbind()
    gate_A = x_TH.new_empty(rows, dtype=torch.float32)
    if rows:
        place_rows[(blocks,)](
            rank_TE,
            gates_TE,
            ends_EC,
            token_A,
            slot_A,
            gate_A,
            tokens,
            blocks,
            top_k,
            EXPERTS=experts,
            EXPERTS_PADDED=padded,
            BLOCK_T=BLOCK_T,
            num_warps=4,
        )
    return SortedRouting(
        logits_TE=logits_TE,
        gates_TE=gates_TE,
        rank_TE=rank_TE,
        token_A=token_A,
        slot_A=slot_A,
        gate_A=gate_A,
        ends_E=ends_EC[blocks - 1 :: blocks].contiguous(),
    )

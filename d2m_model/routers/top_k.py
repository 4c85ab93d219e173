"""Top-k router: every token goes to the k experts that it scores highest (Sec. 3.1, Eq. 3).

Shapes: T tokens, H hidden size, E experts, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Gate, Routing, float32_linear


def check_top_k(top_k: int, experts: int) -> None:
    """Raise ValueError unless 0 <= top_k <= experts."""
    if not 0 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; expected 0 to {experts}, the number of experts.")


def route_top_k(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, *, top_k: int, gate: Gate) -> Routing:
    """Eq. 3: the top_k experts of alpha = softmax(W_g x), in float32 whatever the dtypes of x and W_g.

    gate.mode `sum`: every chosen expert has weight 1. `normalised`: gate.scale * alpha_i / sum of the
    chosen alphas, through which the router learns. Equal logits go to the lower expert index, on every
    device. Raises ValueError for a top_k outside 0 ... E.
    """
    check_top_k(top_k, weight_EH.shape[0])
    logits_TE = float32_linear(x_TH, weight_EH, bias_E)
    # A stable sort, because torch.topk promises no order among ties. Logits order as their softmax does.
    experts_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if gate.mode == "sum":
        gates_TK = torch.ones_like(experts_TK, dtype=torch.float32)
    else:
        # Renormalising a softmax over the chosen is the softmax of their logits.
        gates_TK = gate.scale * logits_TE.gather(-1, experts_TK).softmax(dim=-1)
    return Routing.even(experts_TK, gates_TK, logits_TE, gate_unit=gate.scale)

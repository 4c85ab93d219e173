"""Eq. 1-3 of the paper, literally: one token at a time, one expert at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2m_model.config import FFNLayout, Gate


def gelu(x: Tensor) -> Tensor:
    """FLUX's GELU, the tanh approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def chosen(alpha_E: Tensor, top_k: int) -> list[int]:
    """TopK(alpha, k), best first; among equals the lower index."""
    return sorted(range(alpha_E.numel()), key=lambda e: (-alpha_E[e].item(), e))[:top_k]


def moe_ffn(
    x_TH: Tensor,
    up_NH: Tensor,
    up_bias_N: Tensor,
    down_HN: Tensor,
    down_bias_H: Tensor,
    router_EH: Tensor,
    router_bias_E: Tensor | None,
    expert_mean_EH: Tensor | None,
    *,
    layout: FFNLayout,
    gate: Gate,
    top_k: int,
    choices: list[list[int]] | None = None,
) -> Tensor:
    """y_TH in float64. `choices` puts the experts of every token in the router's place."""

    def mlp(x_H: Tensor, neurons: slice) -> Tensor:
        return down_HN[:, neurons] @ gelu(up_NH[neurons] @ x_H + up_bias_N[neurons])

    def expert(e: int) -> slice:
        return slice(layout.shared + e * layout.width, layout.shared + (e + 1) * layout.width)

    y_TH = []
    for t, x_H in enumerate(x_TH):
        logits_E = router_EH @ x_H
        if router_bias_E is not None:
            logits_E = logits_E + router_bias_E
        alpha_E = logits_E.softmax(dim=0)
        experts = chosen(alpha_E, top_k) if choices is None else choices[t]
        y_H = mlp(x_H, slice(0, layout.shared)) + down_bias_H
        if expert_mean_EH is not None:
            y_H = y_H + expert_mean_EH.sum(dim=0)
        for e in experts:
            normalised = gate.scale * alpha_E[e] / torch.stack([alpha_E[j] for j in experts]).sum()
            weight = normalised if gate.mode == "normalised" else 1.0
            output_H = mlp(x_H, expert(e))
            if expert_mean_EH is not None:
                output_H = output_H - expert_mean_EH[e]
            y_H = y_H + weight * output_H
        y_TH.append(y_H)
    return torch.stack(y_TH) if y_TH else x_TH.new_zeros(x_TH.shape)

"""Eq. 1-3 of the paper, literally: one token at a time, one expert at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2m_model.config import FFNLayout, Gate


def gelu(x: Tensor) -> Tensor:
    """FLUX's GELU, the tanh approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def chosen(alpha_E: Tensor, top_k: int) -> list[int]:
    """TopK(alpha, k), best first; among equals the lower index."""
    return sorted(range(alpha_E.numel()), key=lambda e: (-alpha_E[e].item(), e))[:top_k]


@dataclass
class MoE:
    """One MoE FFN. `choices` puts the experts of every token in the router's place."""

    up_NH: Tensor
    up_bias_N: Tensor
    down_HN: Tensor
    down_bias_H: Tensor
    router_EH: Tensor
    router_bias_E: Tensor | None
    expert_mean_EH: Tensor | None
    layout: FFNLayout
    gate: Gate
    top_k: int
    choices: list[list[int]] | None = None

    def gates(self, t: int, x_H: Tensor) -> dict[int, Tensor]:
        """Eq. 3: the chosen experts of token t and their weights."""
        logits_E = self.router_EH @ x_H + (0 if self.router_bias_E is None else self.router_bias_E)
        alpha_E = logits_E.softmax(dim=0)
        experts = chosen(alpha_E, self.top_k) if self.choices is None else self.choices[t]
        if self.gate.mode == "sum":
            return {e: torch.ones((), dtype=torch.float64) for e in experts}
        return {e: self.gate.scale * alpha_E[e] / torch.stack([alpha_E[j] for j in experts]).sum() for e in experts}

    def neurons(self, expert: int) -> slice:
        first = self.layout.shared + expert * self.layout.width
        return slice(first, first + self.layout.width)

    def mlp(self, x_H: Tensor, neurons: slice) -> Tensor:
        """Eq. 1 without b2."""
        return self.down_HN[:, neurons] @ gelu(self.up_NH[neurons] @ x_H + self.up_bias_N[neurons])

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Eq. 2, with means where experts are not chosen."""
        y_TH = []
        for t, x_H in enumerate(x_TH):
            y_H = self.mlp(x_H, slice(0, self.layout.shared)) + self.down_bias_H
            if self.expert_mean_EH is not None:
                y_H = y_H + self.expert_mean_EH.sum(dim=0)
            for e, weight in self.gates(t, x_H).items():
                output_H = self.mlp(x_H, self.neurons(e))
                if self.expert_mean_EH is not None:
                    output_H = output_H - self.expert_mean_EH[e]
                y_H = y_H + weight * output_H
            y_TH.append(y_H)
        return torch.stack(y_TH) if y_TH else x_TH.new_zeros(x_TH.shape)

    def rounding(self, x_TH: Tensor, dtype: torch.dtype) -> Tensor:
        """How far a result computed in `dtype` may be from the exact one, element by element.

        Two roundings of every term there is, as if none cancelled another: an error of the equation is
        larger by far. Below the dtype's normal numbers, as much again as the smallest of them.
        """
        limits = torch.finfo(dtype)
        scale_TH = []
        for t, x_H in enumerate(x_TH):
            scale_H = self.mlp_terms(x_H, slice(0, self.layout.shared)) + self.down_bias_H.abs()
            if self.expert_mean_EH is not None:
                scale_H = scale_H + self.expert_mean_EH.abs().sum(dim=0)
            for e, weight in self.gates(t, x_H).items():
                terms_H = self.mlp_terms(x_H, self.neurons(e))
                if self.expert_mean_EH is not None:
                    terms_H = terms_H + self.expert_mean_EH[e].abs()
                scale_H = scale_H + weight * terms_H
            scale_TH.append(scale_H)
        return limits.eps * torch.stack(scale_TH) + limits.tiny

    def mlp_terms(self, x_H: Tensor, neurons: slice) -> Tensor:
        """Sizes of the terms of `mlp`, W1's and GELU's carried through W2."""
        pre_F = self.up_NH[neurons] @ x_H + self.up_bias_N[neurons]
        terms_F = self.up_NH[neurons].abs() @ x_H.abs() + self.up_bias_N[neurons].abs()
        return self.down_HN[:, neurons].abs() @ (terms_F + gelu(pre_F).abs())

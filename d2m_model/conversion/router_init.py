"""Initial routers: random (the paper's), the experts' centroids, or a regression of the experts' output norms.

Shapes: T tokens, H hidden size, N neurons, E experts, F expert width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..config import FFNLayout
from .least_squares import ridge

RouterInit = Literal["ridge", "centroid", "random"]

RIDGE = 1e-2  # relative to the inputs' mean square


def random_router(layout: FFNLayout, hidden_size: int, generator: torch.Generator) -> Tensor:
    """Return a normal router, float32 [E, H], with logits of order 1. Zeros would send every token to the same experts."""
    return torch.randn(layout.experts, hidden_size, generator=generator) * hidden_size**-0.5


def centroid_router(up_NH: Tensor, order_N: Tensor, layout: FFNLayout) -> Tensor:
    """Return the mean W1 row of each expert's neurons, float32 [E, H], so that a token prefers experts that it excites.

    `up_NH` is the dense FFN's, not yet permuted.
    """
    experts_EF = order_N[layout.shared :].long().view(layout.experts, layout.width)
    router_EH = torch.empty(layout.experts, up_NH.shape[1])
    for row, neurons_F in zip(router_EH, experts_EF, strict=True):
        row.copy_(up_NH[neurons_F].float().mean(0))
    return router_EH


def ridge_router(x_TH: Tensor, norm_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [E, H] and bias [E], float32: ridge regression of each expert's output norm on the FFN's input.

    Scaled so that the logits vary by 1 over tokens and experts, which matters where a softmax weighs the chosen.
    """
    weight_HE, bias_E = ridge(x_TH, norm_TE, RIDGE)
    logits_TE = x_TH.double() @ weight_HE + bias_E
    scale = logits_TE.std().clamp_min(torch.finfo(torch.float32).tiny)
    return (weight_HE / scale).T.float().contiguous(), (bias_E / scale).float()

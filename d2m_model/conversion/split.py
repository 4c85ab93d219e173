"""Which neuron goes where (Sec. 3.1), and a first router.

Shapes: H hidden size, N neurons, E experts, F expert width.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

from ..config import FFNLayout

Dealing = Literal["dealt", "random"]
RouterInit = Literal["centroid", "random"]


def neuron_order(importance_N: Tensor, layout: FFNLayout, dealing: Dealing, generator: torch.Generator) -> Tensor:
    """The permutation of an FFN, int32 [N]: position -> neuron of the dense FFN.

    First the `layout.shared` most important neurons, most important first; then the experts'. `dealt` deals them by
    rank, to and fro, so that every expert has nearly the same importance; `random` is the paper's even deal. Within an
    expert the most important come first. Equal importance goes by index, so the result depends on nothing else.
    """
    if importance_N.shape != (layout.neurons,) or not importance_N.isfinite().all():
        raise ValueError(
            f"importance is {list(importance_N.shape)}, finite; expected [{layout.neurons}] finite numbers."
        )
    ranked_N = importance_N.sort(descending=True, stable=True).indices
    shared, routed = ranked_N[: layout.shared], ranked_N[layout.shared :]
    if dealing == "random":
        ranks_EF = torch.randperm(len(routed), generator=generator).view(layout.experts, layout.width).sort(1).values
    else:
        ranks_FE = torch.arange(len(routed)).view(layout.width, layout.experts)
        ranks_FE[1::2] = ranks_FE[1::2].flip(1)
        ranks_EF = ranks_FE.T
    return torch.cat([shared, routed[ranks_EF.flatten()]]).to(torch.int32)


def centroid_router(up_NH: Tensor, order_N: Tensor, layout: FFNLayout) -> Tensor:
    """float32 [E, H]: the mean W1 row of each expert's neurons, so that a token prefers experts that it excites.

    `up_NH` is the dense FFN's, not yet permuted.
    """
    experts_EF = order_N[layout.shared :].long().view(layout.experts, layout.width)
    router_EH = torch.empty(layout.experts, up_NH.shape[1])
    for row, neurons_F in zip(router_EH, experts_EF, strict=True):
        row.copy_(up_NH[neurons_F].float().mean(0))
    return router_EH


def random_router(layout: FFNLayout, hidden_size: int, generator: torch.Generator) -> Tensor:
    """float32 [E, H], normal, logits of order 1. Never zero: ties would send every token to the same experts."""
    return torch.randn(layout.experts, hidden_size, generator=generator) * hidden_size**-0.5


def generator_for(seed: int, name: str) -> torch.Generator:
    """Randomness that depends on the seed and on what it is for, not on what was drawn before."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

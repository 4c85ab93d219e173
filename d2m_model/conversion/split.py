"""Order of an FFN's neurons: the shared ones, then those of each expert (Sec. 3.1).

Shapes: N neurons, R of them routed, E experts, F expert width.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

from ..config import FFNLayout

Dealing = Literal["dealt", "random"]


def neuron_order(importance_N: Tensor, layout: FFNLayout, dealing: Dealing, generator: torch.Generator) -> Tensor:
    """Return the permutation of an FFN, int32 [N] (position -> neuron of the dense FFN), from the importance alone.

    First the `layout.shared` most important neurons; then the experts'. `dealt` deals them by rank, to and fro, so that
    every expert has nearly the same importance; `random` is the paper's even deal.
    """
    ranked_N = ranked_neurons(importance_N, layout)
    routed = layout.neurons - layout.shared
    if dealing == "random":
        expert_R = torch.arange(routed)[torch.randperm(routed, generator=generator)] % layout.experts
    else:
        rounds_FE = torch.arange(layout.experts).repeat(layout.width, 1)
        rounds_FE[1::2] = rounds_FE[1::2].flip(1)
        expert_R = rounds_FE.flatten()
    return order_of(ranked_N, expert_R, layout)


def ranked_neurons(importance_N: Tensor, layout: FFNLayout) -> Tensor:
    """Return neurons by importance, int64 [N], the most important first; among equals the lower index.

    Raises ValueError for importance of another length, or that is not finite.
    """
    if importance_N.shape != (layout.neurons,) or not importance_N.isfinite().all():
        raise ValueError(
            f"importance is {list(importance_N.shape)}, finite; expected [{layout.neurons}] finite numbers."
        )
    return importance_N.sort(descending=True, stable=True).indices


def order_of(ranked_N: Tensor, expert_R: Tensor, layout: FFNLayout) -> Tensor:
    """Return the order, int32 [N]: shared neurons, then each expert's, by importance. expert_R has the expert by rank.

    Raises ValueError for experts of unequal size.
    """
    sizes = torch.bincount(expert_R, minlength=layout.experts).tolist()
    if sizes != [layout.width] * layout.experts:
        raise ValueError(f"experts of {sizes} neurons; expected {layout.experts} of {layout.width}.")
    routed_R = ranked_N[layout.shared :][expert_R.sort(stable=True).indices]
    return torch.cat([ranked_N[: layout.shared], routed_R]).to(torch.int32)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a generator that depends only on the seed and on the name of its use."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

"""Block routers fitted to a calibration, and a report on how well they choose.

Shapes: n observations, H hidden size, M blocks of a group.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..config import BlockGroup
from ..mob import BlockRouters, BlockRouting, random_block_routers, ridge_block_routers, route_blocks
from .split import generator_for

BlockRouterInit = Literal["ridge", "random"]
_REPORTED = 4  # the report uses one observation in so many, which its fit does not see
FEWEST = 2 * _REPORTED  # observations that a fit needs


@dataclass(kw_only=True, slots=True, frozen=True)
class BlockChange:
    """Mean square of a block's output - input (Fig. 3), over all tokens and over the image tokens.

    Blocks are compared by the image tokens: a change of the text matters only where later blocks read it. (In the emoji
    FLUX, the last double block changes the text more than all others together, yet the image needs it least in its group.)
    """

    mse: float
    image_mse: float


@dataclass(kw_only=True, slots=True, frozen=True)
class GroupObservations:
    """Observations of a block group in the dense model, over prompts and timesteps.

    x_mean_nH, vec_nH  the router's inputs before the group's first block (mob.mean_tokens, vec)
    change_nM          the norm of each block's change of the image tokens, |B(x) - x|
    """

    x_mean_nH: Tensor
    vec_nH: Tensor
    change_nM: Tensor

    def select(self, which_n: Tensor) -> GroupObservations:
        """Return some of the observations."""
        return GroupObservations(
            x_mean_nH=self.x_mean_nH[which_n], vec_nH=self.vec_nH[which_n], change_nM=self.change_nM[which_n]
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class ChoiceReport:
    """Quality of a choice.

    agreement  fraction of the chosen blocks that the oracle chooses too
    skipped    the change by blocks that were not chosen, as a fraction of the group's change
    """

    agreement: float
    skipped: float


@dataclass(kw_only=True, slots=True, frozen=True)
class GroupReport:
    """Quality of several ways to choose a group's blocks, on observations that no fit has seen.

    random     random routers, the paper's initialisation
    fixed      always the blocks that change most on average, without a router
    ridge      fitted routers
    oracle     the blocks with the largest change
    converted  the kind that the file gets: `random` or `ridge`
    """

    random: ChoiceReport
    fixed: ChoiceReport
    ridge: ChoiceReport
    oracle: ChoiceReport
    converted: BlockRouterInit

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def plan_block_routers(
    name: str, group: BlockGroup, seen: GroupObservations, init: BlockRouterInit, seed: int
) -> tuple[BlockRouters, GroupReport]:
    """Return the group's routers, fitted to all observations, and a report on routers fitted to a part of them.

    Ridge routers learn each block's share of the group's change, which gives every sample the same weight.
    Raises ValueError for fewer than FEWEST observations.
    """
    seen = replace(seen, change_nM=seen.change_nM / seen.change_nM.sum(dim=1, keepdim=True))
    if len(seen.change_nM) < FEWEST:
        raise ValueError(f"There are {len(seen.change_nM)} calibration samples; expected {FEWEST} or more.")
    kept_n = torch.arange(len(seen.change_nM)) % _REPORTED == 0
    fit, rest = seen.select(~kept_n), seen.select(kept_n)
    random = random_block_routers_of(name, group, seen.x_mean_nH.shape[1], seed)
    fixed_nM = fit.change_nM.mean(dim=0).expand_as(rest.change_nM)
    report = GroupReport(
        random=_judge(rest, group, random),
        fixed=_choice(rest, group, _best(fixed_nM, group)),
        ridge=_judge(rest, group, _ridge(fit)),
        oracle=_choice(rest, group, _best(rest.change_nM, group)),
        converted=init,
    )
    return (_ridge(seen) if init == "ridge" else random), report


def random_block_routers_of(name: str, group: BlockGroup, hidden_size: int, seed: int) -> BlockRouters:
    """Return the paper's initial routers for this seed and group."""
    return random_block_routers(group.blocks, hidden_size, generator_for(seed, f"{name} router"))


def _ridge(seen: GroupObservations) -> BlockRouters:
    return ridge_block_routers(seen.x_mean_nH, seen.vec_nH, seen.change_nM)


def _best(score_nM: Tensor, group: BlockGroup) -> Tensor:
    """Return the choice of a router with these logits, bool [n, M]."""
    nothing_nM, identity_MM = torch.zeros_like(score_nM), 2 * torch.eye(group.blocks)  # alpha is 1/2
    return route_blocks(score_nM, nothing_nM, identity_MM, identity_MM, group.active, group.selection).chosen_BM


def _judge(seen: GroupObservations, group: BlockGroup, routers: BlockRouters) -> ChoiceReport:
    routing: BlockRouting = route_blocks(
        seen.x_mean_nH, seen.vec_nH, routers.x_MH, routers.y_MH, group.active, group.selection
    )
    return _choice(seen, group, routing.chosen_BM)


def _choice(seen: GroupObservations, group: BlockGroup, chosen_nM: Tensor) -> ChoiceReport:
    oracle_nM = _best(seen.change_nM, group)
    agreement_n = (chosen_nM & oracle_nM).sum(dim=1) / max(1, group.active)
    skipped_n = (seen.change_nM * ~chosen_nM).sum(dim=1)
    return ChoiceReport(agreement=float(agreement_n.mean()), skipped=float(skipped_n.mean()))

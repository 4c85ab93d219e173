"""Allotment of a compute budget: experts per token of each FFN, and active blocks of each group, by noise level.

The budget is a share of the dense model's FLOPs, averaged over the steps of a run. It is spent greedily by the file's
table (sensitivity.py): first where an expert or a block takes most error away per FLOP. Steps of k that the table shows
to be useless are passed over: only the falling part of each table's lower convex hull is bought. The order of the
purchases does not depend on the budget, and the first one that does not fit ends them. So a larger budget never takes
anything away, and no budget is exceeded. Without block groups no other allotment of the same cost has less error by the
table.

At a budget of 1 every expert and every block runs, which costs slightly more than the dense model: there are routers.

This allotment is the project's own: the greedy solution of a knapsack whose gains diminish.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .blocks import FFN, Block
from .config import FluxMoEConfig
from .cost import DENSE, Conversion, Cost, Tokens, double_block, ffn, flux, single_block, stand_in
from .sensitivity import Sensitivity

_EDGE = 1 + 1e-6  # noise levels are rounded to float32
_CAPACITIES = tuple(round(0.05 * number, 2) for number in range(161))  # factors that are tried: 0 to 8


@dataclass(kw_only=True, slots=True)
class Spending:
    """Parts that run at one noise level: experts per token by FFN, and active blocks of each group."""

    top_k: dict[str, int]
    active_blocks: list[int]


@dataclass(kw_only=True, slots=True, frozen=True)
class Allotment:
    """Parts that run at each noise level of a run, from noise to image.

    lowest     lower edges of the noise levels
    spendings  what runs in each
    share      mean FLOPs of a step, as a share of the dense model's
    """

    lowest: tuple[float, ...]
    spendings: tuple[Spending, ...]
    share: float

    def at(self, sigma: float) -> Spending:
        """Return what runs at noise level `sigma`. An edge belongs to the noise levels below it."""
        return self.spendings[_index_at(self.lowest, sigma)]


def _index_at(lowest: Sequence[float], sigma: float) -> int:
    return next((index for index, lower in enumerate(lowest) if sigma > lower * _EDGE), len(lowest) - 1)


def allot(
    config: FluxMoEConfig, table: Sensitivity, budget: float, tokens: Tokens, sigmas: Sequence[float] = ()
) -> Allotment:
    """Return the allotment of a budget, which is a share of the dense model's FLOPs.

    `table` is the file's. `sigmas` are the noise levels of the run, the last of them where it ends; without them every bin
    of the table has an equal share of the steps, as in the schedule that it was measured for. An error of the velocity
    changes the image by its product with the step, and the errors of neighbouring steps are alike, so the errors of a bin
    count by the square of its width. A budget below the cost of the least that can run gets that.
    """
    bins, prices = _bins(table, sigmas), _Prices(config, tokens)
    if budget >= 1:
        spendings = [everything(config) for _ in bins]
    else:
        spendings = _spend(config, table, budget, bins, prices)
    share = sum(part.steps * prices.share(spending) for part, spending in zip(bins, spendings, strict=True))
    return Allotment(lowest=tuple(part.lower for part in bins), spendings=tuple(spendings), share=share)


def everything(config: FluxMoEConfig) -> Spending:
    """Return the spending at a budget of 1: every expert and every block."""
    return Spending(
        top_k={name: layout.experts for name, layout in config.ffns.items()},
        active_blocks=[group.blocks for group in config.groups],
    )


def one_value(config: FluxMoEConfig, budget: float, tokens: Tokens) -> float:
    """Return the highest value of the routers' setting whose cost is within the budget, for a file without a table.

    All FFNs have it at all noise levels, and block groups stay the file's own. It is 0 if nothing fits, and the highest
    of all at a budget of 1.
    """
    fewest, router = config.fewest_experts, config.router
    highest = router.highest(fewest)
    values: Sequence[float] = _CAPACITIES if highest is None else range(highest + 1)
    if budget >= 1:
        return values[-1]
    most = budget * flux(config.dims, DENSE, tokens).flops
    fitting = [value for value in values if flux(config.dims, Conversion.of(config, value), tokens).flops <= most]
    return max(fitting, default=0)


def cost_of(config: FluxMoEConfig, budget: float, tokens: Tokens) -> Cost:
    """Return the mean cost of a step under a budget, as hosts spend it on an evenly spaced run."""
    table = config.sensitivity
    if table is None:
        active = everything(config).active_blocks if budget >= 1 else None
        return flux(config.dims, Conversion.of(config, one_value(config, budget, tokens), active_blocks=active), tokens)
    spendings = allot(config, table, budget, tokens).spendings
    costs = [flux(config.dims, conversion_of(config, spending), tokens) for spending in spendings]
    total = sum(costs, Cost())
    return replace(total.activated(1 / len(costs)), total=costs[0].total)


def conversion_of(config: FluxMoEConfig, spending: Spending) -> Conversion:
    """Return the conversion whose cost is that of the spending."""
    return Conversion.of(config, 0, active_blocks=spending.active_blocks, experts_by_ffn=spending.top_k)


# Noise levels


@dataclass(slots=True)
class _Bin:
    """Noise levels of the run that lie in one bin of the table."""

    number: int  # in the table
    lower: float
    steps: float  # as a share of the run's
    width: float  # difference of the noise levels where these steps begin and end


def _bins(table: Sensitivity, sigmas: Sequence[float]) -> list[_Bin]:
    """Return the bins that have steps of the run, from noise to image."""
    edges = list(itertools.pairwise(table.levels))
    if len(sigmas) < 2:
        return [_Bin(number, lower, 1 / len(edges), upper - lower) for number, (upper, lower) in enumerate(edges)]
    bins = [_Bin(number, lower, 0, 0) for number, (_, lower) in enumerate(edges)]
    for now, following in itertools.pairwise(sigmas):
        part = bins[_index_at(table.levels[1:], now)]
        part.steps += 1 / (len(sigmas) - 1)
        part.width += abs(now - following)
    return [part for part in bins if part.steps]


# Prices


class _Prices:
    """Prices of experts and blocks in one step, as shares of the dense model's FLOPs."""

    def __init__(self, config: FluxMoEConfig, tokens: Tokens) -> None:
        self._config, self._tokens, dims = config, tokens, config.dims
        self._dense = flux(dims, DENSE, tokens).flops
        idle = Conversion.of(config, 0, active_blocks=[0] * len(config.groups))
        self.least = flux(dims, idle, tokens).flops / self._dense  # if no expert runs, and no block of a group
        lengths = {"img": tokens.image, "txt": tokens.text, "joint": tokens.joint}
        self.expert: dict[str, float] = {}
        for name, layout in config.ffns.items():
            one, none = (ffn(dims.hidden_size, layout, k, lengths[FFN.parse(name).stream]).flops for k in (1, 0))
            self.expert[name] = (one - none) / self._dense
        self._idle_block: dict[Block, float] = {}  # without experts
        for block in (block for group in config.groups for block in group.members):
            cost_of_kind = double_block if block.kind == "double" else single_block
            saved = stand_in(dims.hidden_size, block, config.stand_in_rank, tokens).flops
            self._idle_block[block] = (cost_of_kind(dims, block.index, idle, tokens).flops - saved) / self._dense

    def share(self, spending: Spending) -> float:
        """Return the price of all that runs."""
        return flux(self._config.dims, conversion_of(self._config, spending), self._tokens).flops / self._dense

    def block(self, block: Block, top_k: dict[str, int]) -> float:
        """Return the price of a group's block with its experts."""
        names = [one.name for one in block.ffns if one.name in self.expert]
        return self._idle_block[block] + sum(top_k[name] * self.expert[name] for name in names)


# Purchases


@dataclass(slots=True)
class _Offer:
    """Purchases that are left to one FFN, or one group, in one bin.

    `corners` are pairs of k, or active blocks, and the error there: the last is the present one, the dearest comes first.
    """

    part: _Bin
    spending: Spending
    ffn: str | None
    group: int | None
    corners: list[tuple[int, float]]

    def rate(self, config: FluxMoEConfig, prices: _Prices) -> float:
        """Return the price per error of the next purchase.

        A block of a group runs for a part of the samples: its experts then cost, and gain, that part of it.
        """
        (now, error), (following, less) = self.corners[-1], self.corners[-2]
        gain = self.part.width**2 * (error - less)
        price = (following - now) * self._unit(config, prices)
        return self.part.steps * price / gain if gain else float("inf")

    def cost(self, config: FluxMoEConfig, prices: _Prices, running: float) -> float:
        """Return the price of the next purchase, as a mean over the steps; `running`: the part of samples it is for."""
        return self.part.steps * running * (self.corners[-2][0] - self.corners[-1][0]) * self._unit(config, prices)

    def _unit(self, config: FluxMoEConfig, prices: _Prices) -> float:
        if self.ffn is not None:
            return prices.expert[self.ffn]
        assert self.group is not None
        group = config.groups[self.group]
        return sum(prices.block(block, self.spending.top_k) for block in group.members) / group.blocks

    def take(self) -> None:
        self.corners.pop()
        if self.ffn is not None:
            self.spending.top_k[self.ffn] = self.corners[-1][0]
        elif self.group is not None:
            self.spending.active_blocks[self.group] = self.corners[-1][0]


def _spend(
    config: FluxMoEConfig, table: Sensitivity, budget: float, bins: Sequence[_Bin], prices: _Prices
) -> list[Spending]:
    """Return what the budget buys in each bin."""
    spendings = [Spending(top_k=dict.fromkeys(config.ffns, 0), active_blocks=[0] * len(config.groups)) for _ in bins]
    offers: list[_Offer] = []
    for part, spending in zip(bins, spendings, strict=True):
        for name, errors in table.ffns.items():
            offers.append(_Offer(part, spending, name, None, falling_hull(errors[part.number])[::-1]))
        for index, errors in enumerate(table.groups):
            offers.append(_Offer(part, spending, None, index, falling_hull(errors[part.number])[::-1]))
    group_of = {one.name: n for n, group in enumerate(config.groups) for block in group.members for one in block.ffns}
    heap = [(offer.rate(config, prices), place) for place, offer in enumerate(offers) if len(offer.corners) > 1]
    heapq.heapify(heap)
    spent = prices.least
    while heap:
        asked, place = heapq.heappop(heap)
        offer = offers[place]
        rate = offer.rate(config, prices)
        if rate > asked:  # a group whose blocks have got experts meanwhile
            heapq.heappush(heap, (rate, place))
            continue
        group = None if offer.ffn is None else group_of.get(offer.ffn)
        running = 1.0 if group is None else offer.spending.active_blocks[group] / config.groups[group].blocks
        cost = offer.cost(config, prices, running)
        if spent + cost > budget:
            break
        spent += cost
        offer.take()
        if len(offer.corners) > 1:
            heapq.heappush(heap, (offer.rate(config, prices), place))
    return spendings


def falling_hull(errors: Sequence[float]) -> list[tuple[int, float]]:
    """Return the corners (k, error) of the errors' lower convex hull, from k = 0 to the first smallest error."""
    corners: list[tuple[int, float]] = []
    for k, error in enumerate(errors[: errors.index(min(errors)) + 1]):
        while len(corners) > 1:
            (before, high), (last, low) = corners[-2:]
            if (high - low) * (k - last) > (low - error) * (last - before):  # the gain per k falls at `last`
                break
            corners.pop()
        corners.append((k, error))
    return corners

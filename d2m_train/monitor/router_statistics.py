"""Statistics of routers in training: load, entropy, dead experts, balance, and the blocks that are chosen.

Sums stay on the device until an interval ends; then they are reduced over ranks at once. Padding text tokens do not count,
except in `balance_with_padding` (Sec. 4.4: they all go to the same experts).

Shapes: B batch, T tokens, E experts, A assignments, M blocks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2m_model.mob import BlockRouting
from d2m_model.moe import MoEFFN
from d2m_model.routers import Routing

from ..distillation.losses import balance_loss
from ..distillation.router_losses import PaddedTokens, PaddingMasks, RoutedModel
from .stage_log import StageLog

_PARTS = (
    "passes",
    "tokens",
    "probability_entropy",
    "balance",
    "balance_with_padding",
)  # of a layer's sums, after the load

_ERRORS = " errors"  # of a group, after its name

# Assignments for each expert, on average, before one without any counts as dead: routed at random, one in 10**9 would get none.
_ENOUGH = 20

_NAMED_LAYERS = 3  # with dead experts, in a warning; its line in the log has all


@dataclass(kw_only=True, slots=True)
class RouterSummary:
    """Statistics of one interval.

    scalars  `<ffn>/<measure>` of each layer, and `<measure>`, the mean over layers
    load     for each FFN, the fraction of assignments that each expert got
    blocks   for each group, how often each block ran
    """

    scalars: dict[str, float]
    load: dict[str, list[float]]
    blocks: list[list[float]]


def counts_step(step: int, steps: int, every: int) -> bool:
    """Return whether a step's choices are counted: ten steps of the `every` between two reports, and the last of all.

    Counting all would take a dozen small kernels for each layer of every microbatch.
    """
    return step % max(1, every // 10) == 0 or step == steps


@dataclass(slots=True)
class RouterStatistics:
    """Statistics of a student in training: `add` after a forward pass, `report` at the end of an interval, on every rank."""

    model: RoutedModel
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _loads: dict[str, Tensor] = field(default_factory=dict)  # of each FFN, since its experts were last judged
    _dead: dict[str, list[int]] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, batch: PaddedTokens | None = None) -> None:
        """Add the choices of the last forward pass. `batch` is the one it ran on, which tells padding; None: no padding."""
        masks: PaddingMasks | None = None
        for name, moe in self.model.moe_ffns().items():
            if moe.routing is None:
                continue
            if batch is not None and masks is None:
                masks = PaddingMasks(batch, moe.routing.logits_TE.device)
            self._add(name, layer_sums(moe.routing, None if masks is None else masks.kept(name)))
        for number, group in enumerate(self.model.block_groups):
            if isinstance(group.routing, BlockRouting):
                self._add(f"block_groups.{number}", group_sums(group.routing))
                if group.routing.errors_BM is not None:
                    self._add(f"block_groups.{number}{_ERRORS}", error_sums(group.routing, group.routing.errors_BM))

    def report(self, log: StageLog, step: int, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Log the statistics since the last report. `reduce` sums or averages a tensor over ranks.

        Experts that got no token cause a warning when they first appear, and again only when they change. They are judged
        once there were enough tokens, over several reports if need be.
        """
        if not self._sums:
            return
        sums, ffns = self._reduced(reduce), self.model.moe_ffns()
        statistics = summary(sums, ffns)
        self._sums.clear()
        log.scalars(step, statistics.scalars, "router", uncharted=tuple(f"{name}/" for name in ffns))
        if statistics.load:
            log.event(
                "expert_load", step=step, load={n: [round(v, 5) for v in of] for n, of in statistics.load.items()}
            )
        if new := self._newly_dead({name: sums[name][: -len(_PARTS)] for name in statistics.load}):
            some = list(new)[:_NAMED_LAYERS]
            named = "; ".join(f"{name}: {', '.join(map(str, new[name]))}" for name in some)
            more = f"; and in {len(new) - _NAMED_LAYERS} more layers, see the log" if len(new) > _NAMED_LAYERS else ""
            log.event(
                "warning",
                step=step,
                message=f"dead experts, no token since the last count ({named}{more}). Where it lasts, raise losses.balance "
                "in stage experts.",
                dead=new,
            )

    def _newly_dead(self, loads: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Return the experts of each FFN that got no token, where those are others than before.

        `loads`: assignments of each FFN's experts since the last report.
        """
        new: dict[str, list[int]] = {}
        for name, load_E in loads.items():
            load_E = load_E + self._loads.pop(name, 0)
            if float(load_E.sum()) < _ENOUGH * len(load_E):
                self._loads[name] = load_E
                continue
            dead = torch.nonzero(load_E == 0).flatten().tolist()
            if dead and dead != self._dead.get(name):
                new[name] = dead
            self._dead[name] = dead
        return new

    def _add(self, name: str, sums: Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _reduced(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Reduce all sums in one message, whatever the number of layers."""
        parts = list(self._sums.values())
        together = reduce(torch.cat(parts)).double().cpu()
        return dict(zip(self._sums, together.split([len(part) for part in parts]), strict=True))


def layer_sums(routing: Routing, kept_BT: Tensor | None) -> Tensor:
    """float32 [E + 5]: assignments of each expert, then _PARTS, of one forward pass of one FFN.

    The balance loss is GShard's; it is 0 for a capacity router, whose pool is balanced by construction.
    """
    probabilities_TE = routing.probabilities_TE.detach()
    tokens, experts = probabilities_TE.shape
    if kept_BT is None:
        kept_BT = torch.ones(1, tokens, dtype=torch.bool, device=probabilities_TE.device)
    kept_T = kept_BT.flatten().float()
    balance = with_padding = probabilities_TE.new_zeros(())
    if routing.per_token is not None:
        shape = (len(kept_BT), -1)
        by_sequence = probabilities_TE.unflatten(0, shape), routing.experts_TK.unflatten(0, shape)
        balance, with_padding = balance_loss(*by_sequence, kept_BT), balance_loss(*by_sequence)
    # Without waiting for the device, as bincount does.
    load_E = kept_T.new_zeros(experts).scatter_add(0, routing.expert_A, kept_T[routing.token_A])
    entropy_T = torch.special.entr(probabilities_TE).sum(-1) / math.log(max(2, experts))
    parts = (kept_T.new_ones(()), kept_T.sum(), (entropy_T * kept_T).sum(), balance, with_padding)
    return torch.cat([load_E, torch.stack(parts)])


def group_sums(routing: BlockRouting) -> Tensor:
    """float32 [2 M + 1]: how often each block was chosen, the sums of p, and the number of samples."""
    chosen_BM, p_BM = routing.chosen_BM.float(), routing.probabilities_BM.detach()
    return torch.cat([chosen_BM.sum(0), p_BM.sum(0), chosen_BM.new_full((1,), len(chosen_BM))])


def error_sums(routing: BlockRouting, errors_BM: Tensor) -> Tensor:
    """float32 [M + 3]: sums of each block's error alone, of the chosen and of the best block's, and the number of samples."""
    chosen, best = (errors_BM * routing.chosen_BM).sum(), errors_BM.min(dim=1).values.sum()
    return torch.cat([errors_BM.sum(0), torch.stack([chosen, best, errors_BM.new_full((), len(errors_BM))])])


def error_measures(sums: Tensor) -> dict[str, float]:
    """Return the mean error of a group with its router's choices, and with others.

    error         the router's choices
    error_random  blocks chosen at random
    error_fixed   the same block for every sample, the best one of them
    error_best    the best block for each sample
    """
    *alone, chosen, best = (sums[:-1] / sums[-1]).tolist()
    return {
        "error": chosen,
        "error_random": sum(alone) / len(alone),
        "error_fixed": min(alone),
        "error_best": best,
    }


def summary(sums: Mapping[str, Tensor], ffns: Mapping[str, MoEFFN]) -> RouterSummary:
    """Compute statistics from the sums of an interval, keyed by FFN name, `block_groups.g` or `block_groups.g errors`."""
    statistics = RouterSummary(scalars={}, load={}, blocks=[])
    layers: dict[str, dict[str, float]] = {}
    for name, values in sums.items():
        if name.endswith(_ERRORS):
            group = name.removesuffix(_ERRORS)
            statistics.scalars |= {f"{group}/{measure}": value for measure, value in error_measures(values).items()}
            continue
        if name not in ffns:
            blocks = len(values) // 2
            fractions = (values[:blocks] / values[-1]).tolist()
            statistics.blocks.append(fractions)
            statistics.scalars |= {f"{name}/block_{index}": value for index, value in enumerate(fractions)}
            statistics.scalars[f"{name}/choice_entropy"] = entropy(fractions)
            statistics.scalars[f"{name}/probability_entropy"] = entropy(values[blocks:-1].tolist())
            continue
        load, parts = values[: -len(_PARTS)], dict(zip(_PARTS, values[-len(_PARTS) :].tolist(), strict=True))
        share = (load / load.sum().clamp_min(1e-12)).tolist()
        statistics.load[name] = share
        layers[name] = {
            "load_entropy": entropy(share),
            "largest_load": max(share),
            "dead_experts": float((load == 0).sum()),
            "experts_per_token": float(load.sum()) / max(1.0, parts["tokens"]),
            "probability_entropy": parts["probability_entropy"] / max(1.0, parts["tokens"]),
        }
        if ffns[name].token_router.balanced:
            layers[name] |= {part: parts[part] / parts["passes"] for part in ("balance", "balance_with_padding")}
    for name, measures in layers.items():
        statistics.scalars |= {f"{name}/{measure}": value for measure, value in measures.items()}
    for measure in next(iter(layers.values()), {}):
        statistics.scalars[measure] = sum(measures[measure] for measures in layers.values()) / len(layers)
    return statistics


def entropy(shares: Iterable[float]) -> float:
    """Entropy of non-negative numbers as a distribution, relative to the maximum: 1 if all are equal, 0 if one has all."""
    shares = list(shares)
    total = sum(shares)
    if len(shares) < 2 or total <= 0:
        return 0.0
    nats = -sum(share / total * math.log(share / total) for share in shares if share > 0)
    return nats / math.log(len(shares))

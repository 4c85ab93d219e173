"""What routers learn from besides the teacher: balance losses, capacity predictors, and thresholds that follow.

Shapes: B batch, T image and L text tokens, E experts, K top_k, M blocks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from d2m_model.blocks import FFN
from d2m_model.config import FluxMoEConfig
from d2m_model.mob import BlockRouting, block_balance_loss, choice_fractions
from d2m_model.moe import MoEFFN
from d2m_model.routers import RouterCompanion
from d2m_model.routers.token_router import pool_of

from ..run_config import RunConfig
from .losses import StepLosses, balance_loss
from .stages import StagePlan


def as_is(tensor: Tensor) -> Tensor:
    return tensor


class PaddedTokens(Protocol):
    """What routers' losses must know of a batch's tokens: how many the image has, and which of the text's are no padding."""

    @property
    def image_ids_T3(self) -> Tensor: ...

    @property
    def words_BL(self) -> Tensor: ...


class RoutedModel(Protocol):
    """A FLUX-MoE in training, or some blocks of one: its FFNs by name, and all block routers."""

    @property
    def block_groups(self) -> nn.ModuleList: ...

    @property
    def flux_moe(self) -> FluxMoEConfig: ...

    def moe_ffns(self) -> dict[str, MoEFFN]: ...


@dataclass(kw_only=True, slots=True)
class RouterTraining:
    """What routers learn from besides the teacher: balance, predictors, and thresholds that follow.

    `core` is the model itself, in no wrapper. `average` means a tensor over the ranks.
    """

    core: RoutedModel
    plan: StagePlan
    run: RunConfig
    average: Callable[[Tensor], Tensor] = field(default=as_is)
    fractions: dict[str, Tensor] = field(
        default_factory=dict
    )  # of each group, how often its blocks ran in the last step
    thresholds: dict[str, list[Tensor]] = field(default_factory=dict)  # of the step's microbatches so far, by FFN
    chosen: dict[str, list[Tensor]] = field(default_factory=dict)  # the same, by group

    def __post_init__(self) -> None:
        if self.plan.block_balance:
            for number, (group, config) in enumerate(
                zip(self.core.block_groups, self.core.flux_moe.groups, strict=True)
            ):
                device = next(group.parameters()).device
                if device.type != "meta":  # of blockwise mode's one part the others' have no weights
                    share = config.active / config.blocks
                    self.fractions[str(number)] = torch.full((config.blocks,), share, device=device)

    def set_pools(self, tokens: PaddedTokens) -> None:
        """Padding text tokens stay out of a capacity router's pool. One mask per stream."""
        pools: dict[str, Tensor | None] = {}
        for name, moe in self.core.moe_ffns().items():
            if moe.companion is None:
                continue
            stream = FFN.parse(name).stream
            if stream not in pools:
                kept_BT = kept_tokens(name, tokens)
                pools[stream] = None if bool(kept_BT.all()) else pool_of(kept_BT.to(moe.companion.device))
            moe.companion.pool_P = pools[stream]

    def step_losses(self, total: Tensor, parts: dict[str, Tensor], tokens: PaddedTokens) -> StepLosses:
        """Losses against the teacher, with those of the routers added: after the forward pass that made them."""
        parts = dict(parts)
        for name, loss, weight in self._losses(tokens, total.device):
            parts[name] = loss
            total = total + weight * loss
        return StepLosses(total=total, parts={name: part.detach() for name, part in {"total": total, **parts}.items()})

    def _losses(self, tokens: PaddedTokens, device: torch.device) -> Iterator[tuple[str, Tensor, float]]:
        """(name, loss, weight), of what the last forward pass chose: of token routers, of block routers, and of capacity
        predictors, which nothing else learns from."""
        if self.plan.token_balance:
            yield "balance", self._token_balance(tokens, device), self.run.losses.balance
        balances = []
        for number in self.fractions:
            routing = self.core.block_groups[int(number)].routing
            if isinstance(routing, BlockRouting):
                self.chosen.setdefault(number, []).append(choice_fractions(routing))
                balances.append(block_balance_loss(routing, self.fractions[number].to(device)))
        if balances:
            yield "block_balance", torch.stack(balances).mean(), self.run.losses.balance
        losses: dict[str, list[Tensor]] = {}
        for _, companion in self._companions():
            if (loss := companion.loss()) is not None:
                losses.setdefault(companion.loss_name, []).append(loss)
        for name, found in losses.items():
            yield name, torch.stack(found).mean(), 1.0

    def after_backward(self) -> None:
        """Take the thresholds that follow from the pools just routed. Called once a microbatch."""
        for name, companion in self._companions():
            self.thresholds.setdefault(name, []).append(companion.take_update())

    def end_step(self) -> None:
        """Once a step, on every rank alike: thresholds and choice fractions follow, by the mean over its microbatches and
        all ranks.

        So how a global batch is dealt to ranks and microbatches does not matter. What block routers are balanced by is
        the global batch of the step before, since a step's own is known when its last microbatch has run.
        """
        for number, found in self.chosen.items():
            self.fractions[number].copy_(self.average(torch.stack(found).mean(0)))
        self.chosen.clear()
        for name, companion in self._companions():
            if thresholds := self.thresholds.pop(name, []):
                companion.update(self.average(torch.stack(thresholds).mean(0)))

    def _companions(self) -> Iterator[tuple[str, RouterCompanion]]:
        """Companions of routers that are being trained, by FFN."""
        for name, moe in self.core.moe_ffns().items():
            if self.plan.experts_on and moe.companion is not None and moe.companion.learns:
                yield name, moe.companion

    def _token_balance(self, tokens: PaddedTokens, device: torch.device) -> Tensor:
        """The mean over layers of GShard's loss; padding text tokens count only if the run says so."""
        found = []
        for name, moe in self.core.moe_ffns().items():
            routing = moe.routing
            if routing is None or routing.per_token is None or not moe.router.weight.requires_grad:
                continue
            kept_BT = kept_tokens(name, tokens).to(device)
            if self.run.losses.text_padding:
                kept_BT = torch.ones_like(kept_BT)
            samples = len(kept_BT)
            found.append(
                balance_loss(
                    routing.probabilities_TE.unflatten(0, (samples, -1)),
                    routing.experts_TK.unflatten(0, (samples, -1)),
                    kept_BT,
                )
            )
        return torch.stack(found).mean() if found else torch.zeros((), device=device)


def kept_tokens(ffn: str, tokens: PaddedTokens) -> Tensor:
    """bool [B, tokens]: which of the tokens that an FFN sees are no padding. A single block's begin with the text."""
    words_BL = tokens.words_BL
    image_BT = torch.ones(len(words_BL), len(tokens.image_ids_T3), dtype=torch.bool)
    return {"img": image_BT, "txt": words_BL, "joint": torch.cat([words_BL, image_BT], 1)}[FFN.parse(ffn).stream]

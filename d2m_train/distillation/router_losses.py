"""Losses of routers: balance, choice of blocks, capacity predictors; and thresholds that follow the routing.

Shapes: B batch, T image and L text tokens, E experts, K top_k, M blocks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d2m_model.blocks import FFN
from d2m_model.config import FluxMoEConfig
from d2m_model.mob import BlockRouting, block_balance_loss, block_choice_loss, choice_fractions
from d2m_model.moe import MoEFFN
from d2m_model.routers import TrainingCompanion
from d2m_model.routers.token_router import pool_of

from ..data.copying import copy_to_device
from ..run_config import RunConfig
from .block_choice import idle_loss, image_errors
from .losses import StepLosses, balance_loss
from .stages import StagePlan


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class PaddedTokens(Protocol):
    """A batch's tokens as routers' losses see them: how many the image has, and which text tokens are not padding."""

    @property
    def image_ids_T3(self) -> Tensor: ...

    @property
    def words_BL(self) -> Tensor: ...


class RoutedModel(Protocol):
    """A FLUX-MoE in training, or some of its blocks: MoE FFNs by name, and all block routers."""

    @property
    def block_groups(self) -> nn.ModuleList: ...

    @property
    def flux_moe(self) -> FluxMoEConfig: ...

    def moe_ffns(self) -> dict[str, MoEFFN]: ...


@dataclass(kw_only=True, slots=True)
class RouterTraining:
    """The routers of a student in training: their losses, and thresholds that follow the routing.

    core        the model itself, in no wrapper
    average     the mean of a tensor over the ranks
    fractions   for each group, how often its blocks ran in the last step
    thresholds  of the step's microbatches so far, by FFN
    chosen      choice fractions of the step's microbatches so far, by group
    """

    core: RoutedModel
    plan: StagePlan
    run: RunConfig
    average: Callable[[Tensor], Tensor] = field(default=_unchanged)
    fractions: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, list[Tensor]] = field(default_factory=dict)
    chosen: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.plan.block_balance:
            weights = self.run.losses
            group: Any
            for number, (group, config) in enumerate(
                zip(self.core.block_groups, self.core.flux_moe.groups, strict=True)
            ):
                device = next(group.parameters()).device
                if device.type != "meta":  # in blockwise mode, groups of other parts have no weights
                    group.compares = weights.block_choice + weights.idle_blocks > 0
                    share = config.active / config.blocks
                    self.fractions[str(number)] = torch.full((config.blocks,), share, device=device)

    def set_pools(self, tokens: PaddedTokens) -> None:
        """Keep padding text tokens out of the pool of a capacity router. All FFNs of a stream share a mask."""
        pools: dict[str, Tensor | None] = {}
        for name, moe in self.core.moe_ffns().items():
            if not isinstance(moe.companion, TrainingCompanion):
                continue
            stream = FFN.parse(name).stream
            if stream not in pools:
                kept_BT = kept_tokens(name, tokens)  # on the host, where counting them waits for nothing
                pools[stream] = None if bool(kept_BT.all()) else copy_to_device(pool_of(kept_BT), moe.companion.device)
            moe.companion.pool_P = pools[stream]

    def step_losses(
        self, total: Tensor, parts: dict[str, Tensor], tokens: PaddedTokens, features: Mapping[str, Tensor]
    ) -> StepLosses:
        """Add the routers' losses to those against the teacher (`total`, and `parts` for the log), after a forward pass.

        `features`: the teacher's block outputs, by the names that `stream_names` has for the student's blocks.
        """
        parts = dict(parts)
        for name, loss, weight in self._losses(tokens, total.device, features):
            parts[name] = loss
            total = total + weight * loss
        return StepLosses(total=total, parts={name: part.detach() for name, part in {"total": total, **parts}.items()})

    def _losses(
        self, tokens: PaddedTokens, device: torch.device, features: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, float]]:
        """Yield (name, loss, weight) for the choices of the last forward pass: token balance, the losses of block routers
        and idle blocks, and the loss of capacity predictors, their only one."""
        if self.plan.token_balance:
            yield "balance", self._token_balance(tokens, device), self.run.losses.balance
        yield from self._block_losses(device, features)
        losses: dict[str, list[Tensor]] = {}
        for _, companion in self._companions():
            if (loss := companion.loss()) is not None:
                losses.setdefault(companion.loss_name, []).append(loss)
        for name, layers in losses.items():
            yield name, torch.stack(layers).mean(), 1.0

    def _block_losses(
        self, device: torch.device, features: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, float]]:
        """Yield (name, loss, weight) of block routers and idle blocks, each loss a mean over groups."""
        losses: dict[str, list[Tensor]] = {}
        for number in self.fractions:
            group: Any = self.core.block_groups[int(number)]
            routing, compared = group.routing, group.compared
            if isinstance(routing, BlockRouting):
                self.chosen.setdefault(number, []).append(choice_fractions(routing))
                balance = block_balance_loss(routing, self.fractions[number].to(device))
                losses.setdefault("block_balance", []).append(balance)
                if compared is not None:
                    config = self.core.flux_moe.groups[int(number)]
                    routing.errors_BM = image_errors(config, compared, features).detach()
                    losses.setdefault("block_choice", []).append(block_choice_loss(routing, routing.errors_BM))
                    losses.setdefault("idle_blocks", []).append(idle_loss(config, routing, compared, features))
                    group.compared = None
        for name, of_groups in losses.items():
            yield name, torch.stack(of_groups).mean(), getattr(self.run.losses, name)

    def after_backward(self) -> None:
        """Take the thresholds that follow from the pools just routed. Called once per microbatch."""
        for name, companion in self._companions():
            self.thresholds.setdefault(name, []).append(companion.take_update())

    def end_step(self) -> None:
        """Called once per step on every rank: set thresholds and choice fractions to means over microbatches and ranks.

        So the result does not depend on how a global batch is divided. Block routers are balanced by the global batch of
        the step before, since a step's own fractions are known only after its last microbatch.
        """
        for number, fractions in self.chosen.items():
            self.fractions[number].copy_(self.average(torch.stack(fractions).mean(0)))
        self.chosen.clear()
        for name, companion in self._companions():
            if thresholds := self.thresholds.pop(name, []):
                companion.update(self.average(torch.stack(thresholds).mean(0)))

    def _companions(self) -> Iterator[tuple[str, TrainingCompanion]]:
        """Yield the companions of routers that are being trained, by FFN."""
        for name, moe in self.core.moe_ffns().items():
            if self.plan.experts_on and isinstance(moe.companion, TrainingCompanion) and moe.companion.learns:
                yield name, moe.companion

    def _token_balance(self, tokens: PaddedTokens, device: torch.device) -> Tensor:
        """The mean of GShard's balance loss over layers. Padding text tokens count only if losses.text_padding says so."""
        losses = []
        masks = PaddingMasks(tokens, device)
        for name, moe in self.core.moe_ffns().items():
            routing = moe.routing
            if routing is None or routing.per_token is None or not moe.router.weight.requires_grad:
                continue
            kept_BT = masks.kept(name)
            if self.run.losses.text_padding:
                kept_BT = torch.ones_like(kept_BT)
            samples = len(kept_BT)
            losses.append(
                balance_loss(
                    routing.probabilities_TE.unflatten(0, (samples, -1)),
                    routing.experts_TK.unflatten(0, (samples, -1)),
                    kept_BT,
                )
            )
        return torch.stack(losses).mean() if losses else torch.zeros((), device=device)


class PaddingMasks:
    """The masks of `kept_tokens` on a device. All FFNs of a stream share one, which is copied when it is first asked for."""

    def __init__(self, tokens: PaddedTokens, device: torch.device) -> None:
        self._tokens, self._device = tokens, device
        self._by_stream: dict[str, Tensor] = {}

    def kept(self, ffn: str) -> Tensor:
        stream = FFN.parse(ffn).stream
        if stream not in self._by_stream:
            self._by_stream[stream] = copy_to_device(kept_tokens(ffn, self._tokens), self._device)
        return self._by_stream[stream]


def kept_tokens(ffn: str, tokens: PaddedTokens) -> Tensor:
    """bool [B, tokens]: the tokens of an FFN that are not padding. A single block's tokens begin with the text."""
    words_BL = tokens.words_BL
    image_BT = torch.ones(len(words_BL), len(tokens.image_ids_T3), dtype=torch.bool)
    return {"img": image_BT, "txt": words_BL, "joint": torch.cat([words_BL, image_BT], 1)}[FFN.parse(ffn).stream]

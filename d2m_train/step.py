"""One microbatch of distillation: both models' forward passes, and every loss between them (Sec. 3.2).

Shapes: B batch, T image and L text tokens, C channels of a token, E experts, K top_k, M blocks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2m_model.capacity import pool_of, updated_threshold
from d2m_model.mob import BlockRouting, block_balance_loss, choice_fractions
from d2m_model.moe import MoEFFN
from d2m_model.routers import Routing

from .data.batch import Batch
from .features import block_outputs, streams_of
from .losses import balance_loss, distillation_losses
from .noise import Noisy, noisy_batch
from .run_config import RunConfig
from .stages import Plan
from .velocity import velocity

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel


@dataclass(kw_only=True, slots=True)
class StepLosses:
    """Scalars of one microbatch. `total` has the graph; `parts` are detached, for people; `layers` are Eq. 8's bare terms."""

    total: Tensor
    parts: dict[str, Tensor]
    layers: dict[str, Tensor]


def as_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(kw_only=True, slots=True)
class Distillation:
    """A stage's comparison of a student with its teacher.

    `student` is what is called (wrapped for several ranks, as a rule); `core` is the model within it. `average` means a
    tensor over the ranks.
    """

    teacher: FluxTransformer2DModel
    student: Any
    core: FluxMoETransformer2DModel
    plan: Plan
    run: RunConfig
    average: Callable[[Tensor], Tensor] = field(default=as_is)
    thresholds: dict[str, list[Tensor]] = field(default_factory=dict)  # of the step's microbatches so far, by FFN

    def losses(self, batch: Batch, index: int) -> StepLosses:
        """Of batch number `index`, which its noise depends on. The student is left as it is but for its routers' records."""
        noisy = noisy_batch(batch, self.run.timesteps, self.run.seed, index, self.teacher)
        self._set_pools(batch)
        return self.compare(batch, noisy)

    def compare(self, batch: Batch, noisy: Noisy) -> StepLosses:
        """`losses` at given noise, for pools of a capacity router that are set."""
        guided = self.teacher.config.guidance_embeds
        inputs = (batch, noisy.tokens_BTC, noisy.t_B, batch.guidance_B)
        with torch.no_grad(), block_outputs(self.teacher, [f.teacher for f in self.plan.features]) as teacher_outputs:
            wanted_BTC = velocity(self.teacher, *inputs, guided)
        with block_outputs(self.core, [f.student for f in self.plan.features]) as student_outputs:
            found_BTC = velocity(self.student, *inputs, guided)
        device = found_BTC.device
        losses = distillation_losses(
            wanted_BTC.to(device),
            found_BTC,
            {own: teacher_outputs[other].to(device) for own, other in self._pairs()},
            student_outputs,
            self._token_balance(batch, device) if self.plan.token_balance else None,
            self.run.losses.outliers,
        )
        total = losses.total(feature=self.run.losses.feature, balance=self.run.losses.balance)
        parts = {"output": losses.output, "features": losses.weighted_features}
        if self.plan.token_balance:
            parts["balance"] = losses.balance
        for name, loss, weight in self._other_losses():
            parts[name] = loss
            total = total + weight * loss
        return StepLosses(
            total=total,
            parts={name: part.detach() for name, part in {"total": total, **parts}.items()},
            layers={name: loss.detach() for name, loss in losses.features.items()},
        )

    def after_backward(self) -> None:
        """Once a microbatch: what capacity thresholds make of the pool that was just routed."""
        for name, moe in self._predicting():
            assert moe.capacity is not None
            pooled, moe.capacity.pooled = moe.capacity.pooled, None
            self.thresholds.setdefault(name, []).append(updated_threshold(moe.capacity.threshold, pooled))

    def end_step(self) -> None:
        """Once a step, on every rank alike: thresholds follow, by the mean over its microbatches and all ranks.

        So how a global batch is dealt to ranks and microbatches does not matter.
        """
        for name, moe in self._predicting():
            assert moe.capacity is not None
            if found := self.thresholds.pop(name, []):
                moe.capacity.threshold.copy_(self.average(torch.stack(found).mean(0)))

    def _predicting(self) -> Iterator[tuple[str, MoEFFN]]:
        """The FFNs whose capacity predictor is being trained."""
        for name, moe in self.core.moe_ffns().items():
            if self.plan.experts_on and moe.capacity is not None and moe.capacity.in_layer.weight.requires_grad:
                yield name, moe

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for feature in self.plan.features:
            yield from zip(streams_of(feature.student), streams_of(feature.teacher), strict=True)

    def _token_balance(self, batch: Batch, device: torch.device) -> Tensor:
        """The mean over layers of GShard's loss; padding text tokens count only if the run says so."""
        found = []
        for name, moe in self.core.moe_ffns().items():
            routing = moe.routing
            if not isinstance(routing, Routing) or not moe.router.weight.requires_grad:
                continue
            kept_BT = kept_tokens(name, batch).to(device)
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

    def _other_losses(self) -> Iterator[tuple[str, Tensor, float]]:
        """(name, loss, weight): of block routers, and of capacity predictors, which nothing else learns from."""
        if self.plan.block_balance:
            found = [group.routing for group in self.core.block_groups]
            routings = [routing for routing in found if isinstance(routing, BlockRouting)]
            losses = [block_balance_loss(r, self.average(choice_fractions(r))) for r in routings]
            yield "block_balance", torch.stack(losses).mean(), self.run.losses.balance
        pools = [moe.capacity.pooled for _, moe in self._predicting() if moe.capacity is not None]
        losses = [pool.predictor_loss() for pool in pools if pool is not None]
        if losses:
            yield "predictor", torch.stack(losses).mean(), 1.0

    def _set_pools(self, batch: Batch) -> None:
        """Padding text tokens stay out of a capacity router's pool. One mask for each kind of FFN."""
        pools: dict[str, Tensor | None] = {}
        for name, moe in self.core.moe_ffns().items():
            if moe.capacity is None:
                continue
            kind = _kind(name)
            if kind not in pools:
                kept_BT = kept_tokens(name, batch)
                device = moe.capacity.threshold.device
                pools[kind] = None if bool(kept_BT.all()) else pool_of(kept_BT.to(device))
            moe.capacity.pool_P = pools[kind]


def _kind(ffn: str) -> str:
    return ffn.rsplit(".", 1)[1] if ffn.startswith("double_blocks.") else "single"


def kept_tokens(ffn: str, batch: Batch) -> Tensor:
    """bool [B, tokens]: which of the tokens that an FFN sees are no padding. A single block's begin with the text."""
    words_BL = batch.words_BL
    image_BT = torch.ones(len(words_BL), len(batch.image_ids_T3), dtype=torch.bool)
    return {"img_mlp": image_BT, "txt_mlp": words_BL, "single": torch.cat([words_BL, image_BT], 1)}[_kind(ffn)]

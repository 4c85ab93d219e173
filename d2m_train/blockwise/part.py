"""A part of the student in training by itself, against the teacher's features: a block, or a whole group of blocks.

Shapes: B batch, T image and L text tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2m_model.blocks import Block, BlockKind, blocks_of
from d2m_model.config import FluxMoEConfig
from d2m_model.hosts.diffusers.modules import GroupRoutings
from d2m_model.hosts.diffusers.tensor_map import ffn_module
from d2m_model.moe import MoEFFN

from ..data.copying import copy_to_device, pinned
from ..data.order import sample_order
from ..distillation.features import stream_names
from ..distillation.losses import StepLosses, feature_losses
from ..distillation.router_losses import RouterTraining
from ..distillation.stages import StagePlan
from ..flow.velocity import evaluating
from ..monitor.router_statistics import RouterStatistics, counts_step
from ..monitor.stage_log import StageLog
from ..training.one_ahead import OneAhead
from ..training.stage_run import StageRun
from ..training.trainee import Trainee
from .feature_store import Conditions, Features, FeatureStore

if TYPE_CHECKING:
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """Consecutive blocks of the student that are trained as one: a block, or the group with the number `group`.

    start, end  depths of the teacher (feature_store.py): the input of the first block, and the target of the last
    """

    name: str  # of the block in BFL's style, or block_groups.0
    kind: BlockKind
    blocks: tuple[int, ...]
    start: int
    end: int
    group: int | None

    def has(self, name: str) -> bool:
        """Return whether a tensor or module, named as in diffusers, belongs to this part."""
        prefixes = [f"{Block(self.kind, index).diffusers_name}." for index in self.blocks]
        if self.group is not None:
            prefixes.append(f"block_groups.{self.group}.")
        return name.startswith(tuple(prefixes))


class PartBlocks(nn.Module):
    """The blocks of a part in sequence; the student's other blocks have no weights."""

    def __init__(self, core: FluxMoETransformer2DModel, part: Part, *, checkpointing: bool) -> None:
        super().__init__()
        blocks = blocks_of(core)
        self.part = part
        self.blocks = nn.ModuleList(blocks[Block(part.kind, index)] for index in part.blocks)
        self.router = None if part.group is None else core.block_groups[part.group]
        self._core = (core,)  # in a tuple, so that it is no child module: other blocks do not belong to this part
        self.checkpointing = checkpointing and len(part.blocks) > 1  # a single block would be recomputed as a whole

    @property
    def block_groups(self) -> nn.ModuleList:
        """All block groups of the student; only this part's is ever used."""
        return self._core[0].block_groups

    @property
    def flux_moe(self) -> FluxMoEConfig:
        return self._core[0].flux_moe

    def moe_ffns(self) -> dict[str, MoEFFN]:
        """The MoE FFNs of this part, by BFL name."""
        return {name: moe for name, moe in self._core[0].moe_ffns().items() if self.part.has(ffn_module(name))}

    def forward(
        self, image_BTH: Tensor, text_BLH: Tensor, temb_BH: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return (image, text) after the last block."""
        from d2m_model.hosts.diffusers.blocks import ROUTINGS

        attention = None if self.router is None else {ROUTINGS: GroupRoutings(routers=self.block_groups)}
        for block in self.blocks:
            arguments = (image_BTH, text_BLH, temb_BH, rotary, attention)
            if self.checkpointing and torch.is_grad_enabled():
                text_BLH, image_BTH = checkpoint(block, *arguments, use_reentrant=False)
            else:
                text_BLH, image_BTH = block(*arguments)
        return image_BTH, text_BLH


def compared(kind: str, features: Features) -> dict[str, Tensor]:
    """Features for Eq. 8, float32: both streams of a double block, the joint stream of a single block."""
    image_BTH, text_BLH = features.image_BTH.float(), features.text_BLH.float()
    if kind == "double":
        return {"img": image_BTH, "txt": text_BLH}
    return {"both": torch.cat([text_BLH, image_BTH], 1)}


def relative_losses(
    kind: str, given: Features, target: Features, computed: Features, outliers: float | None = None
) -> dict[str, Tensor]:
    """Unweighted terms of Eq. 8, relative to their value if the blocks did nothing; so 1 means no change in every block.

    Like the weights of Eq. 9, this keeps blocks and noise levels with large features from counting for more.
    """
    features = compared(kind, target)
    losses = feature_losses(features, compared(kind, computed), outliers)
    changes = feature_losses(features, compared(kind, given), outliers)
    tiny = torch.finfo(torch.float32).eps
    return {
        name: loss / changes[name].clamp_min(tiny * features[name].square().mean()).clamp_min(tiny)
        for name, loss in losses.items()
    }


@dataclass(kw_only=True, slots=True, frozen=True)
class StoredMicrobatch:
    """An entry of the feature store, and the one that follows it in training; features are read when they are needed."""

    index: int
    following: int | None
    conditions: Conditions

    @property
    def tokens(self) -> int:
        samples, words = self.conditions.words_BL.shape
        return samples * (len(self.conditions.image_ids_T3) + words)


class PartObjective:
    """The objective of one part in one stage: the teacher's features at its end, given those at its start.

    `number` is the part's among those of the stage.
    """

    saves_last_step = False  # the file of the trained part takes the place of its last checkpoint

    def __init__(
        self, stage_run: StageRun, trainee: Trainee, part: Part, number: int, plan: StagePlan, store: FeatureStore
    ) -> None:
        self.name = f"Stage {stage_run.stage}, {part.name}"
        self.run, self.steps = stage_run.run, stage_run.section.steps
        self.steps_before = number * self.steps
        self.part, self.number, self.store = part, number, store
        self.called = trainee.called
        self.routers = RouterTraining(core=trainee.core, plan=plan, run=stage_run.run)
        self.statistics = RouterStatistics(trainee.core)
        self.place = (stage_run.ranks.device, stage_run.dtype)
        self.ahead = OneAhead(self._stored, stage_run.ranks.device)

    def begin(self, start: int, log: StageLog) -> None:
        """Log the error of the untrained part."""
        if start == 0:
            # With the step number of the first step, so that a run that is killed ahead of its first checkpoint logs it once.
            log.scalars(self.steps_before + min(1, self.steps), {"validation/block_error_before": self.error()})

    def microbatches(self, step: int) -> Iterator[StoredMicrobatch]:
        """Yield entries of the store: all in random order, then all in another order."""
        accumulation = self.run.training.accumulation
        seed = (self.run.seed, self.number)
        order = sample_order(self.store.batches, (step - 1) * accumulation, accumulation + 1, seed)
        following = order[1:] if step < self.steps else [*order[1:-1], None]
        for index, after in zip(order[:-1], following, strict=True):
            yield StoredMicrobatch(index=index, following=after, conditions=self.store.conditions(index))

    def losses(self, microbatch: StoredMicrobatch) -> StepLosses:
        given, target = map(self._on_device, self.ahead.take(microbatch.index, microbatch.following))
        self.routers.set_pools(microbatch.conditions)
        computed = self._forward(given, microbatch.conditions)
        weights = self.run.losses
        relative = relative_losses(self.part.kind, given, target, computed, weights.outliers)
        features = torch.stack(list(relative.values())).mean()
        last = stream_names(Block(self.part.kind, self.part.blocks[-1]).name)
        targets = dict(zip(last, compared(self.part.kind, target).values(), strict=True))
        total = weights.feature * features
        return self.routers.step_losses(total, {"features": features}, microbatch.conditions, targets)

    def record(self, microbatch: StoredMicrobatch, step: int) -> None:
        if counts_step(step, self.steps, self.run.eyes.routers_every):
            self.statistics.add(microbatch.conditions)

    def due(self, step: int) -> bool:
        return step % self.run.eyes.routers_every == 0 and step < self.steps

    def measure(self, step: int, log: StageLog) -> None:
        self.statistics.report(log, self.steps_before + step)

    def finish(self, log: StageLog) -> None:
        """Log router statistics and error after the last step."""
        self.measure(self.steps, log)
        log.scalars(self.steps_before + self.steps, {"validation/block_error": self.error()})

    @torch.no_grad()
    def error(self) -> float:
        """The norm of the part's error over the norm of the change that the teacher's blocks make, on held-out entries.

        For a double block, the root mean square of its two streams' values.
        """
        wrong: dict[str, float] = {}
        change: dict[str, float] = {}
        with evaluating(self.called):
            for index in range(self.store.batches, self.store.batches + self.store.held_out):
                given, wanted = map(self._on_device, self._stored(index))
                computed = self._forward(given, self.store.conditions(index))
                target = compared(self.part.kind, wanted)
                for sums, other in ((wrong, computed), (change, given)):
                    for name, tensor in compared(self.part.kind, other).items():
                        sums[name] = sums.get(name, 0.0) + float((tensor - target[name]).double().square().sum())
        tiny = torch.finfo(torch.float32).tiny
        return math.sqrt(sum(wrong[name] / max(change[name], tiny) for name in wrong) / len(wrong))

    def _stored(self, index: int) -> tuple[Features, Features]:
        """Read the teacher's features at the start and at the end of the part, into pinned memory on a GPU's host."""
        given, target = (self.store.features(depth, index) for depth in (self.part.start, self.part.end))
        pin = partial(pinned, device=self.place[0])
        return given.each(pin), target.each(pin)

    def _on_device(self, features: Features) -> Features:
        return features.each(partial(copy_to_device, device=self.place[0], dtype=self.place[1]))

    def _forward(self, given: Features, conditions: Conditions) -> Features:
        image_BTH, text_BLH = self.called(
            given.image_BTH, given.text_BLH, copy_to_device(conditions.temb_BH, *self.place), conditions.rotary
        )
        return Features(image_BTH=image_BTH, text_BLH=text_BLH)

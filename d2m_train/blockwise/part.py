"""A part of the student in training by itself, against the teacher's features: a block, or a whole group of blocks.

Shapes: B batch, T image and L text tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2m_model.blocks import Block, BlockKind, blocks_of
from d2m_model.config import FluxMoEConfig
from d2m_model.hosts.diffusers.modules import GroupRoutings
from d2m_model.hosts.diffusers.tensor_map import ffn_module
from d2m_model.moe import MoEFFN

from ..data.order import places
from ..distillation.losses import feature_losses
from ..distillation.router_losses import RouterTraining
from ..distillation.stages import StagePlan
from ..flow.velocity import evaluating
from ..monitor.router_statistics import RouterStatistics
from ..monitor.stage_log import StageLog
from ..parallel.ranks import Ranks
from ..run_config import RunConfig, Stage, StageSection
from ..training.checkpoints import Checkpoints
from ..training.compiling import compile_blocks
from ..training.loop import Stopped
from ..training.non_finite import find_non_finite, non_finite_error
from ..training.optimizers import Average, new_optimizer
from ..training.state import TrainingState
from .feature_store import Conditions, Features, FeatureStore

if TYPE_CHECKING:
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """Consecutive blocks of the student that are trained as one: a block, or with `group` (its number) a group.

    start, end  depths of the teacher (feature_store.py): what the first block is given, and what the last is to give
    """

    name: str  # of the block in BFL's style, or block_groups.0
    kind: BlockKind
    blocks: tuple[int, ...]
    start: int
    end: int
    group: int | None

    def has(self, name: str) -> bool:
        """Whether a tensor or module, in diffusers' names, is of this part."""
        prefixes = [f"{Block(self.kind, index).diffusers_name}." for index in self.blocks]
        if self.group is not None:
            prefixes.append(f"block_groups.{self.group}.")
        return name.startswith(tuple(prefixes))


class Blocks(nn.Module):
    """A part's blocks of a student whose others have no weights, as they follow each other."""

    def __init__(self, core: FluxMoETransformer2DModel, part: Part, *, checkpointing: bool) -> None:
        super().__init__()
        blocks = blocks_of(core)
        self.part = part
        self.blocks = nn.ModuleList(blocks[Block(part.kind, index)] for index in part.blocks)
        self.router = None if part.group is None else core.block_groups[part.group]
        self._core = (core,)  # not a child: the others are not of this part
        self.checkpointing = checkpointing and len(part.blocks) > 1  # of one block all is computed again anyhow

    @property
    def block_groups(self) -> nn.ModuleList:
        """Of the whole student; only this part's is ever asked."""
        return self._core[0].block_groups

    @property
    def flux_moe(self) -> FluxMoEConfig:
        return self._core[0].flux_moe

    def moe_ffns(self) -> dict[str, MoEFFN]:
        """This part's, by BFL name."""
        return {name: moe for name, moe in self._core[0].moe_ffns().items() if self.part.has(ffn_module(name))}

    def forward(
        self, image_BTH: Tensor, text_BLH: Tensor, temb_BH: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(image, text) after the last block."""
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
    """What Eq. 8 compares: both streams of a double block, the one of a single block. Float32."""
    image_BTH, text_BLH = features.image_BTH.float(), features.text_BLH.float()
    if kind == "double":
        return {"img": image_BTH, "txt": text_BLH}
    return {"both": torch.cat([text_BLH, image_BTH], 1)}


def relative_losses(
    kind: str, given: Features, wanted: Features, found: Features, outliers: float | None = None
) -> dict[str, Tensor]:
    """Eq. 8's bare terms over what they would be if the blocks did nothing, so that 1 is that, for every block alike.

    As Eq. 9 weighs them against each other: what is large in one block, or at one noise level, does not count for more.
    """
    target = compared(kind, wanted)
    losses = feature_losses(target, compared(kind, found), outliers)
    changes = feature_losses(target, compared(kind, given), outliers)
    tiny = torch.finfo(torch.float32).eps
    return {
        name: loss / changes[name].clamp_min(tiny * target[name].square().mean()).clamp_min(tiny)
        for name, loss in losses.items()
    }


class PartTraining:
    """One part in one stage: what changes from step to step, and what makes it change.

    `number` is the part's among those of the stage: its first step is number times `steps` + 1 in the log.
    """

    def __init__(
        self,
        run: RunConfig,
        stage: Stage,
        core: FluxMoETransformer2DModel,
        part: Part,
        number: int,
        plan: StagePlan,
        store: FeatureStore,
        processes: Ranks,
    ) -> None:
        self.run, self.stage, self.part, self.number = run, stage, part, number
        self.store, self.processes = store, processes
        self.section: StageSection = getattr(run.stage, stage)
        core.train()
        self.core = Blocks(core, part, checkpointing=run.training.gradient_checkpointing)
        compile_blocks(list(self.core.blocks), run.training.compile)
        self.trained = {name: p for name, p in self.core.named_parameters() if p.requires_grad}
        optimizer, self.schedule = new_optimizer(list(self.trained.values()), self.section, run.training)
        self.student, self.optimizer = processes.prepare(self.core, optimizer)
        self.average = None if run.training.ema is None else Average(self.trained, run.training.ema)
        self.routers = RouterTraining(core=self.core, plan=plan, run=run)
        self.state = TrainingState(
            model=self.student,
            optimizer=self.optimizer,
            schedule=self.schedule,
            average=self.average,
            routers=self.routers,
            scaler=processes.accelerator.scaler,
        )
        self.statistics = RouterStatistics(self.core)
        self.place = {"device": processes.device, "dtype": getattr(torch, run.student.dtype)}

    def run_steps(self, start: int, checkpoints: Checkpoints, eyes: StageLog) -> None:
        """From step `start` + 1, of which the checkpoint is loaded here, to the stage's last. Raises Stopped."""
        run, steps, first = self.run, self.section.steps, self.number * self.section.steps
        if start:
            self.state.load(checkpoints, start)
        else:
            # Under the first step, so that a run which is killed before its first checkpoint does not say it twice.
            eyes.scalars(first + min(1, steps), {"validation/block_error_before": self.error()})
        for step in range(start + 1, steps + 1):
            where = f"Stage {self.stage}, {self.part.name}, step {step}"
            losses, norm, tokens = self._step(step, where, checkpoints)
            rate = float(self.schedule.get_last_lr()[0])
            eyes.step(first + step, losses, tokens=tokens, learning_rate=rate, grad_norm=norm)
            self.optimizer.step()
            skipped = bool(getattr(self.optimizer, "step_was_skipped", False))  # by fp16's scaler
            if not skipped:
                self.schedule.step()
            self.optimizer.zero_grad()
            self.routers.end_step()
            if self.average is not None and not skipped:
                self.average.update(step)
            with eyes.paused():
                if step == steps:  # what is written of the part stands for its last checkpoint
                    break
                stop = self.processes.stop_asked()
                if step % run.checkpoints.every == 0 or stop:
                    self.state.save(checkpoints, step)
                    eyes.event("saved", step=first + step)
                if stop:
                    said = f"{where}: stopped and saved; resume=latest goes on there"
                    eyes.event("stopped", step=first + step, message=said)
                    raise Stopped
                if step % run.eyes.routers_every == 0:
                    self.statistics.report(eyes, first + step)
        self.statistics.report(eyes, first + steps)
        with self.averaged():
            eyes.scalars(first + steps, {"validation/block_error": self.error()})

    @torch.no_grad()
    def error(self) -> float:
        """On the held-out entries: the norm of what is wrong over the norm of what the teacher's blocks change.

        Of the two streams of a double block the root of their mean square.
        """
        wrong: dict[str, float] = {}
        change: dict[str, float] = {}
        with evaluating(self.student):
            for index in range(self.store.batches, self.store.batches + self.store.held_out):
                given, wanted = self._features(self.part.start, index), self._features(self.part.end, index)
                found = self._ask(given, self.store.conditions(index))
                target = compared(self.part.kind, wanted)
                for sums, other in ((wrong, found), (change, given)):
                    for name, tensor in compared(self.part.kind, other).items():
                        sums[name] = sums.get(name, 0.0) + float((tensor - target[name]).double().square().sum())
        tiny = torch.finfo(torch.float32).tiny
        return math.sqrt(sum(wrong[name] / max(change[name], tiny) for name in wrong) / len(wrong))

    def averaged(self) -> Any:
        return nullcontext() if self.average is None else self.average.in_place()

    # A step

    def _step(self, step: int, where: str, checkpoints: Checkpoints) -> tuple[Mapping[str, Tensor], float, int]:
        """Forward and backward of one optimizer step: mean losses, gradient norm, tokens."""
        found: list[dict[str, Tensor]] = []
        tokens, norm = 0, float("nan")
        for index in self._entries(step):
            with self.processes.accumulate(self.student):
                total, parts, conditions = self._losses(index)
                self.statistics.add(conditions)
                if not bool(total.isfinite()):
                    raise self._not_finite(index, where, checkpoints)
                self.processes.backward(total)
                self.routers.after_backward()
                if self.processes.synchronising:
                    norm = self.processes.clip(list(self.trained.values()), self.run.training.max_grad_norm)
                    if not math.isfinite(norm) and not self.processes.scales_gradients:
                        raise self._not_finite(index, where, checkpoints)
            found.append(parts)
            samples, words = conditions.words_BL.shape
            tokens += samples * (len(conditions.image_ids_T3) + words)
        return {name: torch.stack([parts[name] for parts in found]).mean() for name in found[0]}, norm, tokens

    def _entries(self, step: int) -> Iterator[int]:
        """Of step number `step`, from 1: all entries in random order, then in another."""
        accumulation = self.run.training.accumulation
        seed = (self.run.seed, self.number)
        yield from places(self.store.batches, (step - 1) * accumulation, accumulation, seed)

    def _losses(self, index: int) -> tuple[Tensor, dict[str, Tensor], Conditions]:
        """(total with its graph, the parts detached, what was asked)."""
        given, wanted = self._features(self.part.start, index), self._features(self.part.end, index)
        conditions = self.store.conditions(index)
        self.routers.set_pools(conditions)
        found = self._ask(given, conditions)
        weights = self.run.losses
        each = relative_losses(self.part.kind, given, wanted, found, weights.outliers)
        parts = {"features": torch.stack(list(each.values())).mean()}
        total = weights.feature * parts["features"]
        for name, loss, weight in self.routers.router_losses(conditions, total.device):
            parts[name] = loss
            total = total + weight * loss
        return total, {name: part.detach() for name, part in {"total": total, **parts}.items()}, conditions

    def _features(self, depth: int, index: int) -> Features:
        found = self.store.features(depth, index)
        return Features(image_BTH=found.image_BTH.to(**self.place), text_BLH=found.text_BLH.to(**self.place))

    def _ask(self, given: Features, conditions: Conditions) -> Features:
        image_BTH, text_BLH = self.student(
            given.image_BTH, given.text_BLH, conditions.temb_BH.to(**self.place), conditions.rotary
        )
        return Features(image_BTH=image_BTH, text_BLH=text_BLH)

    def _not_finite(self, index: int, where: str, checkpoints: Checkpoints) -> Exception:
        named = find_non_finite(self.student, lambda: self._losses(index)[0])
        saved = checkpoints.steps()
        return non_finite_error(named, where=where, checkpoint=str(checkpoints.path(saved[-1])) if saved else None)

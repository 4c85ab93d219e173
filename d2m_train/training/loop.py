"""One training stage from a student file to a student file, on one process or many (accelerate).

A stage depends on nothing but its inputs and the step it stands at: batches, noise levels and noise are drawn from the
seed and the number of the microbatch. So a run that is stopped and goes on ends where one that was not stopped ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2m_model.blocks import blocks_of
from d2m_model.config import FluxMoEConfig, Gate
from d2m_model.tensor_file import TensorFile

from ..data.batch import Batch, DataSource
from ..distillation.stages import plan_stage, prepare_student
from ..distillation.step import Distillation, StepLosses
from ..monitor.stage_log import StageLog
from ..monitor.student_monitor import StudentMonitor
from ..parallel.ranks import Ranks, local_share, whole
from ..run_config import RunConfig, Stage, StageSection
from .checkpoints import Checkpoints
from .compiling import compile_blocks
from .non_finite import find_non_finite, non_finite_error
from .optimizers import Average, new_optimizer
from .run_identity import stage_identity
from .state import TrainingState

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), and has saved where it stands."""


@dataclass(kw_only=True, slots=True, frozen=True)
class StageFiles:
    """Where a stage lives: it begins with the student in `source` and ends with the one in `student`."""

    source: Path
    folder: Path
    tensorboard: Path

    @property
    def student(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def train_stage(
    run: RunConfig,
    stage: Stage,
    files: StageFiles,
    processes: Ranks,
    teacher: FluxTransformer2DModel,
    data: DataSource,
    identity: dict[str, Any],
) -> None:
    """Train, from the last checkpoint if there is one, and write the student. Every rank calls this alike.

    Raises Stopped after SIGTERM, and UserError for whatever the user can put right.
    """
    training = _Training(run, stage, files, processes, teacher, data)
    checkpoints = Checkpoints(
        files.checkpoints,
        stage_identity(identity, stage) | {"microbatches of a step": run.training.accumulation * processes.count},
        keep=run.checkpoints.keep,
        main=processes.main,
        wait=processes.wait,
    )
    checkpoints.clean()
    start = processes.of_main((checkpoints.steps() or [0])[-1])
    if start:
        training.state.load(checkpoints, start)
        processes.say(f"{stage}: going on at {checkpoints.path(start).name} of {training.section.steps} steps.")
    with StageLog(
        files.folder,
        files.tensorboard,
        run.eyes,
        stage=stage,
        steps=training.section.steps,
        start=start,
        main=processes.main,
        run_name=run.output_dir.name,
    ) as eyes:
        training.run_steps(start, checkpoints, eyes)
    training.write(files)
    del training  # before the caches are emptied
    processes.release()


class _Training:
    """A student in its stage: what changes from step to step, and what makes it change."""

    def __init__(
        self,
        run: RunConfig,
        stage: Stage,
        files: StageFiles,
        processes: Ranks,
        teacher: FluxTransformer2DModel,
        data: DataSource,
    ) -> None:
        from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

        self.run, self.stage, self.processes, self.data = run, stage, processes, data
        self.section: StageSection = getattr(run.stage, stage)
        dtype = getattr(torch, run.student.dtype)
        core = FluxMoETransformer2DModel.from_flux_moe(files.source, dtype, processes.device)
        self.config = with_gate(core, stage)
        plan = plan_stage(stage, self.config, self.section)
        frozen = run.student.frozen_dtype
        names = set(prepare_student(core, plan, None if frozen is None else getattr(torch, frozen)))
        if run.training.gradient_checkpointing:
            core.enable_gradient_checkpointing()
        core.train()
        compile_blocks([*blocks_of(core).values()], run.training.compile)
        processes.shard(core)
        optimizer, schedule = new_optimizer(
            [parameter for name, parameter in core.named_parameters() if name in names], self.section, run.training
        )
        self.student, self.optimizer = processes.prepare(core, optimizer)
        self.core: FluxMoETransformer2DModel = processes.unwrap(self.student)
        if processes.count > 1:
            share = local_share(self.core)
            processes.say(
                f"{stage}: {processes.count} processes, {processes.strategy}: "
                f"each holds {share:.0%} of the student's weights."
            )
        self.trained = {name: p for name, p in self.core.named_parameters() if p.requires_grad}
        self.schedule = schedule
        # Stage 3 of DeepSpeed's ZeRO keeps parameters in parts, and their tensors empty.
        parts = {name: getattr(p, "ds_tensor", p) for name, p in self.trained.items()}
        self.average = None if run.training.ema is None else Average(parts, run.training.ema)
        self.distillation = Distillation(
            teacher=teacher, student=self.student, core=self.core, plan=plan, run=run, average=processes.average
        )
        self.state = TrainingState(
            model=self.student,
            optimizer=self.optimizer,
            schedule=schedule,
            average=self.average,
            routers=self.distillation,
            scaler=processes.accelerator.scaler,
            zero=processes.zero,
            trained=self.trained,
        )

    def run_steps(self, start: int, checkpoints: Checkpoints, eyes: StageLog) -> None:
        run, processes, steps = self.run, self.processes, self.section.steps
        if start == steps:
            return
        measure = StudentMonitor(self.distillation, self.data, eyes, processes, steps)
        batches = _Batches(run, self.data, processes, steps)
        for step in range(start + 1, steps + 1):
            where = f"Stage {self.stage}, step {step}"
            losses, norm, tokens = self._step(batches.of_step(step), where, checkpoints, measure)
            eyes.step(step, losses, tokens=tokens, learning_rate=float(self.schedule.get_last_lr()[0]), grad_norm=norm)
            self.optimizer.step()
            skipped = bool(getattr(self.optimizer, "step_was_skipped", False))  # by fp16's scaler
            if not skipped:
                self.schedule.step()
            self.optimizer.zero_grad()
            self.distillation.end_step()
            if self.average is not None and not skipped:
                self.average.update(step)
            with eyes.paused():
                stop = processes.stop_asked() and step < steps
                if step % run.checkpoints.every == 0 or step == steps or stop:
                    self.state.save(checkpoints, step)
                    eyes.event("saved", step=step)
                if stop:
                    eyes.event("stopped", step=step, message=f"{where}: stopped and saved; resume=latest goes on there")
                    raise Stopped
                if measure.due(step):
                    processes.reshard(self.core)
                    with self._averaged():
                        measure.after(step)
                    processes.reshard(self.core)

    def _step(
        self, batches: Iterator[tuple[Batch, int]], where: str, checkpoints: Checkpoints, measure: StudentMonitor
    ) -> tuple[dict[str, Tensor], float, int]:
        """Forward and backward of one optimizer step: mean losses, gradient norm, tokens, all of them over all ranks."""
        found: list[StepLosses] = []
        tokens, norm = 0, float("nan")
        for batch, index in batches:
            with self.processes.accumulate(self.student):
                losses = self.distillation.losses(batch, index)
                measure.routing(batch)
                if self.processes.any(not bool(losses.total.isfinite())):
                    raise self._not_finite(batch, index, where, checkpoints)
                self.processes.backward(losses.total)
                self.distillation.after_backward()
                if self.processes.synchronising:
                    norm = self.processes.clip(list(self.trained.values()), self.run.training.max_grad_norm)
                    if not math.isfinite(norm) and not self.processes.scales_gradients:
                        raise self._not_finite(batch, index, where, checkpoints)
            found.append(losses)
            tokens += self.processes.count * len(batch.pooled_BV) * (len(batch.image_ids_T3) + len(batch.text_ids_L3))
        means = {name: torch.stack([losses.parts[name] for losses in found]).mean() for name in found[0].parts}
        return self.processes.averages(means), norm, tokens

    def _not_finite(self, batch: Batch, index: int, where: str, checkpoints: Checkpoints) -> Exception:
        def again() -> Tensor:
            return self.distillation.losses(batch, index).total

        named = find_non_finite(self.student, again, self.processes.any)
        saved = checkpoints.steps()
        return non_finite_error(named, where=where, checkpoint=str(checkpoints.path(saved[-1])) if saved else None)

    def _averaged(self) -> Any:
        return nullcontext() if self.average is None else self.average.in_place()

    def write(self, files: StageFiles) -> None:
        """The student, of the averaged weights where there are some; one tensor at a time is whole.

        What the stage has left alone is the source's, bit for bit, in whatever precision it was held.
        """
        from d2m_model.hosts.diffusers import save_flux_moe

        frozen = {name for name, _ in self.core.named_parameters() if name not in self.trained}
        with self._averaged(), TensorFile(files.source) as source:
            save_flux_moe(
                self.core,
                self.config,
                files.student,
                dtype=getattr(torch, self.run.student.dtype),
                whole=whole,
                write=self.processes.main,
                unchanged=frozen,
                stored=source.tensor,
            )
        self.processes.wait()


def with_gate(core: FluxMoETransformer2DModel, stage: Stage) -> FluxMoEConfig:
    """From stage `experts` on, gates are normalised, so that routers learn, with the k of training as their scale."""
    config = replace(core.flux_moe, split_only=False)
    if stage != "shared" and config.gate.mode == "sum" and config.top_k > 0:
        config = replace(config, gate=Gate(mode="normalised", scale=float(config.top_k)))
    for moe in core.moe_ffns().values():
        moe.gate = config.gate
    return config


class _Batches:
    """This rank's microbatches, and their numbers in the run. On a GPU the next one is made meanwhile."""

    def __init__(self, run: RunConfig, data: DataSource, processes: Ranks, steps: int) -> None:
        self.run, self.data, self.processes = run, data, processes
        self.end = self._index(steps * run.training.accumulation)
        # A CPU trains with all its cores already.
        self.ahead = None if processes.device.type == "cpu" else ThreadPoolExecutor(1, "batches")
        self.coming: tuple[int, Future[Batch]] | None = None

    def of_step(self, step: int) -> Iterator[tuple[Batch, int]]:
        """Of step number `step`, from 1."""
        accumulation = self.run.training.accumulation
        for place in range((step - 1) * accumulation, step * accumulation):
            index = self._index(place)
            yield self._take(index), index

    def _index(self, place: int) -> int:
        return place * self.processes.count + self.processes.rank

    def _take(self, index: int) -> Batch:
        if self.ahead is None:
            return self._make(index)
        coming, self.coming = self.coming, None
        batch = coming[1].result() if coming is not None and coming[0] == index else self._make(index)
        following = index + self.processes.count
        if following < self.end:
            self.coming = following, self.ahead.submit(self._make, following)
        return batch

    def _make(self, index: int) -> Batch:
        return self.data.batch(index, self.run.training.batch_size, self.run.seed)

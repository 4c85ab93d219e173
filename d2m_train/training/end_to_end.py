"""A training stage end to end: the whole student against its teacher, from a student file to a student file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from d2m_model.blocks import blocks_of
from d2m_model.tensor_file import TensorFile

from .. import UserError
from ..data.batch import Batch
from ..data.copying import copy_to_device, pinned
from ..distillation.losses import StepLosses
from ..distillation.router_losses import RouterTraining
from ..distillation.stages import StagePlan
from ..distillation.step import Distillation
from ..flow.noise import NoisyBatch, noisy_batch
from ..monitor.stage_log import StageLog
from ..monitor.student_monitor import StudentMonitor
from ..parallel.parameters import full_tensor, local_share
from .changed_steps import changeable, schedule_text, stored_identity
from .loop import TrainingLoop
from .one_ahead import OneAhead
from .stage_run import StageRun
from .student_file import fill_student, meta_student
from .trainee import Trainee

_MICROBATCHES = "microbatches of a step"  # in a checkpoint's identity


def train_end_to_end(stage_run: StageRun) -> None:
    """Train, from the last checkpoint if there is one, and write the student. Every rank calls this alike.

    Raises Stopped after SIGTERM, and UserError for whatever the user can correct.
    """
    run, stage, ranks, steps = stage_run.run, stage_run.stage, stage_run.ranks, stage_run.section.steps
    core, plan = meta_student(stage_run)
    if run.training.gradient_checkpointing:
        core.enable_gradient_checkpointing()
    ranks.shard(core)
    fill_student(core, stage_run)
    trainee = Trainee(stage_run, core, list(blocks_of(core).values()))
    if ranks.count > 1:
        ranks.say(
            f"{stage}: {ranks.count} processes, {ranks.strategy}: "
            f"each holds {local_share(trainee.core):.0%} of the student's weights."
        )
    # How many microbatches a step has must stay the same; how ranks and accumulation share them may change.
    microbatches = run.training.accumulation * ranks.count
    checkpoints = stage_run.checkpoints(stage_run.checkpoint_folder, **{_MICROBATCHES: microbatches})
    checkpoints.hints[_MICROBATCHES] = partial(_microbatches_hint, processes=ranks.count)
    loop = TrainingLoop(stage_run, trainee, EndToEnd(stage_run, trainee, plan), checkpoints)
    if run.resume == "changed":
        checkpoints.free = changeable(stage)
    start = loop.resume()
    if start > steps:
        raise UserError(f"stage.{stage}.steps is {steps}, but {start} are done already; expected {start} or more.")
    if start and (
        text := schedule_text(stage, stored_identity(checkpoints, start), stage_run.section, run.training, start)
    ):
        ranks.say(text)
    if start:
        ranks.say(f"{stage}: going on at {checkpoints.path(start).name} of {steps} steps.")
    with stage_run.open_log(steps=steps, start=start) as log:
        loop.run_steps(start, log)
    _write(stage_run, trainee, plan)
    del core, trainee, loop  # before the caches are emptied
    ranks.release()


def _microbatches_hint(stored: int, *, processes: int) -> str:
    """Say with which options a run of so many microbatches a step goes on."""
    if stored % processes == 0:
        return f"On {processes} processes, type training.accumulation={stored // processes}."
    return f"Run it on a number of processes that divides {stored}, with training.accumulation={stored} / that number."


@dataclass(kw_only=True, slots=True, frozen=True)
class NumberedBatch:
    """A batch with its number in the run, which seeds its noise.

    `noisy`: the batch at that noise; None for prompts without images, whose noisy inputs the teacher makes on its device.
    """

    batch: Batch
    number: int
    noisy: NoisyBatch | None

    @property
    def tokens(self) -> int:
        return len(self.batch.pooled_BV) * (len(self.batch.image_ids_T3) + len(self.batch.text_ids_L3))


class EndToEnd:
    """The objective of Eq. 10 on a run's data, with validation, sample images and router statistics."""

    steps_before = 0
    saves_last_step = True

    def __init__(self, stage_run: StageRun, trainee: Trainee, plan: StagePlan) -> None:
        self.name = f"Stage {stage_run.stage}"
        self.stage_run = stage_run
        self.distillation = Distillation(
            teacher=stage_run.teacher,
            student=trainee.called,
            core=trainee.core,
            plan=plan,
            run=stage_run.run,
            average=stage_run.ranks.average,
        )
        self.routers: RouterTraining = self.distillation

    def begin(self, start: int, log: StageLog) -> None:
        """Compute the teacher's answers, where there are steps left."""
        stage_run, steps = self.stage_run, self.stage_run.section.steps
        if start < steps:
            self.monitor = StudentMonitor(self.distillation, stage_run.data, stage_run.ranks, steps)
            self.batches = _Batches(stage_run)

    def microbatches(self, step: int) -> Iterator[NumberedBatch]:
        return self.batches.of_step(step)

    def losses(self, microbatch: NumberedBatch) -> StepLosses:
        run, copy = self.stage_run.run, partial(copy_to_device, device=self.stage_run.ranks.device)
        batch = microbatch.batch.each(copy)
        if microbatch.noisy is not None:
            noisy = microbatch.noisy.each(copy)
        else:
            noisy = noisy_batch(batch, run.timesteps, run.seed, microbatch.number, self.stage_run.teacher)
        return self.distillation.losses(batch, noisy)

    def record(self, microbatch: NumberedBatch, step: int) -> None:
        self.monitor.record(microbatch.batch, step)

    def due(self, step: int) -> bool:
        return self.monitor.due(step)

    def measure(self, step: int, log: StageLog) -> None:
        self.monitor.measure(step, log)


class _Batches:
    """This rank's microbatches. On a GPU the next one is made, in pinned memory, while one is trained on (one_ahead.py)."""

    def __init__(self, stage_run: StageRun) -> None:
        self.run, self.data, self.ranks, self.teacher = (
            stage_run.run,
            stage_run.data,
            stage_run.ranks,
            stage_run.teacher,
        )
        self.end = self._number(stage_run.section.steps * self.run.training.accumulation)
        self.ahead = OneAhead(self._make, self.ranks.device)

    def of_step(self, step: int) -> Iterator[NumberedBatch]:
        """Yield the microbatches of a step, counted from 1."""
        accumulation = self.run.training.accumulation
        for index in range((step - 1) * accumulation, step * accumulation):
            number, following = self._number(index), self._number(index + 1)
            yield self.ahead.take(number, following if following < self.end else None)

    def _number(self, index: int) -> int:
        """The number in the run of this rank's microbatch `index`."""
        return index * self.ranks.count + self.ranks.rank

    def _make(self, number: int) -> NumberedBatch:
        batch = self.data.batch(number, self.run.training.batch_size, self.run.seed)
        noisy = None
        if batch.tokens_BTC is not None:
            noisy = noisy_batch(batch, self.run.timesteps, self.run.seed, number, self.teacher)
        pin = partial(pinned, device=self.ranks.device)
        return NumberedBatch(batch=batch.each(pin), number=number, noisy=noisy and noisy.each(pin))


def _write(stage_run: StageRun, trainee: Trainee, plan: StagePlan) -> None:
    """Write the student, with averaged weights where the run keeps an average; one full tensor is in memory at a time.

    Weights that the stage did not train are copied from the source bit for bit, whatever dtype they had in training.
    """
    from d2m_model.hosts.diffusers import save_flux_moe

    frozen = {name for name, _ in trainee.core.named_parameters() if name not in trainee.trained}
    with trainee.averaged(), TensorFile(stage_run.source) as source:
        save_flux_moe(
            trainee.core,
            plan.config,
            stage_run.student,
            dtype=stage_run.dtype,
            whole=full_tensor,
            write=stage_run.ranks.main,
            unchanged=frozen,
            stored=source.tensor,
        )
    stage_run.ranks.wait()

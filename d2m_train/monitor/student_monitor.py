"""Measurements of a student at intervals: validation loss, images beside the teacher's, router statistics."""

from __future__ import annotations

from ..data.batch import Batch, DataSource
from ..distillation.step import Distillation
from ..flow.sampling import new_sample_grid
from ..parallel.ranks import Ranks
from .router_statistics import RouterStatistics, counts_step
from .stage_log import StageLog
from .validation import VALIDATION_LOSS, Validation


class StudentMonitor:
    """Measures the student of one stage of `steps` steps. All methods are called on every rank alike.

    The teacher's velocities and images are made here, ahead of the first step. A resumed run makes the same again.
    """

    def __init__(self, distillation: Distillation, data: DataSource, ranks: Ranks, steps: int) -> None:
        run, teacher = distillation.run, distillation.teacher
        self.distillation, self.ranks, self.steps = distillation, ranks, steps
        self.validation = Validation(
            data, teacher, run.eyes, run.timesteps, batch_size=run.training.batch_size, seed=run.seed
        )
        self.statistics = RouterStatistics(distillation.core)
        self.grid = new_sample_grid(data, teacher, run.eyes, run.timesteps, run.seed) if run.eyes.samples else None

    @property
    def every_block(self) -> bool:
        """True if all blocks of a group must run: ranks gather sharded blocks together, whichever samples chose them."""
        return self.ranks.count > 1

    def record(self, batch: Batch, step: int) -> None:
        """Count what the routers chose. Called after each microbatch's forward pass, while they keep it."""
        if counts_step(step, self.steps, self.distillation.run.eyes.routers_every):
            self.statistics.add(batch)

    def due(self, step: int) -> bool:
        """Tell whether `measure` has anything to do."""
        section = self.distillation.run.eyes
        every = (section.routers_every, section.validate_every, section.sample_every)
        return step == self.steps or any(step % interval == 0 for interval in every)

    def measure(self, step: int, log: StageLog) -> None:
        """Take the measurements that are due after a step; all of them before the first (step 0) and after the last."""
        section, last = self.distillation.run.eyes, step == self.steps
        if step % section.routers_every == 0 or last:
            self.statistics.report(log, step, self.ranks.average)
        if step % section.validate_every == 0 or last:
            self._validate(step, log)
        if self.grid is not None and (step % section.sample_every == 0 or last):
            picture = self.grid.draw(self.distillation.student, self.every_block)
            if picture is not None:
                log.image(step, "samples", picture)

    def _validate(self, step: int, log: StageLog) -> None:
        before = log.last(VALIDATION_LOSS)
        losses = self.validation(self.distillation.student, self.every_block)
        log.scalars(step, losses)
        change = f"{before:.3g} → " if before is not None else ""
        log.say(f"step {step}: validation {change}{losses[VALIDATION_LOSS]:.3g}")

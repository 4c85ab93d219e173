"""What is measured of a student now and then: validation loss, images beside the teacher's, what its routers do."""

from __future__ import annotations

from ..data.batch import Batch, DataSource
from ..distillation.step import Distillation
from ..flow.sampling import new_sample_grid
from ..parallel.ranks import Ranks
from .router_statistics import RouterStatistics
from .stage_log import StageLog
from .validation import Validation


class StudentMonitor:
    """Of one stage. All methods are called on every rank alike.

    The teacher's answers are made before the first step, and again when a run goes on: they are the same.
    """

    def __init__(
        self, distillation: Distillation, data: DataSource, eyes: StageLog, processes: Ranks, steps: int
    ) -> None:
        run, teacher = distillation.run, distillation.teacher
        self.distillation, self.eyes, self.processes, self.steps = distillation, eyes, processes, steps
        self.validation = Validation(
            data, teacher, run.eyes, run.timesteps, batch_size=run.training.batch_size, seed=run.seed
        )
        self.statistics = RouterStatistics(distillation.core)
        self.grid = new_sample_grid(data, teacher, run.eyes, run.timesteps, run.seed) if run.eyes.samples else None

    @property
    def every_block(self) -> bool:
        """Sharded blocks are gathered by all ranks alike, whichever samples chose them."""
        return self.processes.count > 1

    def routing(self, batch: Batch) -> None:
        """After each microbatch's forward pass, while the routers remember it."""
        self.statistics.add(batch)

    def due(self, step: int) -> bool:
        """Whether `after` has anything to do."""
        section = self.distillation.run.eyes
        every = (section.routers_every, section.validate_every, section.sample_every)
        return step == self.steps or any(step % interval == 0 for interval in every)

    def after(self, step: int) -> None:
        """After each step: whatever is due then, and all of it after the last."""
        section, last = self.distillation.run.eyes, step == self.steps
        if step % section.routers_every == 0 or last:
            self.statistics.report(self.eyes, step, self.processes.average)
        if step % section.validate_every == 0 or last:
            losses = self.validation(self.distillation.student, self.every_block)
            self.eyes.scalars(step, losses)
        if self.grid is not None and (step % section.sample_every == 0 or last):
            picture = self.grid.grid_of(self.distillation.student, self.every_block)
            if picture is not None:
                self.eyes.image(step, "samples", picture)

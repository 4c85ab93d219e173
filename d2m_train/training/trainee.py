"""A student with its optimizer, its schedule and the running average of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..parallel.parameters import stored_tensor
from .compiling import compile_blocks
from .optimizers import WeightAverage, new_optimizer
from .stage_run import StageRun


class Trainee:
    """A model as a stage trains it, wrapped for the run's ranks.

    called   runs a forward pass; its backward pass reaches all ranks
    core     the model itself, in no wrapper
    trained  the parameters that learn, by name
    """

    def __init__(self, stage_run: StageRun, core: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """`core`: sharded, if ranks share it; its trained parameters require gradients.
        `blocks`: those modules of it that training.compile compiles.
        """
        training = stage_run.run.training
        self.ranks = stage_run.ranks
        core.train()
        compile_blocks(blocks, training.compile)
        trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
        optimizer, self.schedule = new_optimizer(trained, stage_run.section, training)
        prepared = self.ranks.prepare(core, optimizer)
        self.called, self.core, self.optimizer, self.state = (
            prepared.called,
            prepared.core,
            prepared.optimizer,
            prepared.state,
        )
        self.trained = {name: parameter for name, parameter in core.named_parameters() if parameter.requires_grad}
        self.average = None
        if training.ema is not None:
            stored = {name: stored_tensor(parameter) for name, parameter in self.trained.items()}
            self.average = WeightAverage(stored, training.ema)

    def update(self, step: int) -> None:
        """Take an optimizer step with the gradients of step number `step`, from 1; schedule and average follow."""
        self.optimizer.step()
        skipped = bool(getattr(self.optimizer, "step_was_skipped", False))  # by fp16's scaler
        if not skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        if self.average is not None and not skipped:
            self.average.update(step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the student its averaged weights during the `with`, where the run keeps an average.

        After a pass without gradients a sharded model still has gathered weights, which would hide the exchange.
        """
        self.ranks.reshard(self.core)
        if self.average is None:
            yield
        else:
            with self.average.in_place():
                yield
        self.ranks.reshard(self.core)

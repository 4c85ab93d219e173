"""The training loop of every stage, end to end and blockwise, on one process or many.

A stage depends on nothing but its inputs and the step it has reached: batches, noise levels and noise are drawn from the
seed and the number of the microbatch. So a run that was stopped and resumed ends with the same weights as one that was
not, and no generator state is saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..distillation.losses import StepLosses
from ..distillation.router_losses import RouterTraining
from ..monitor.stage_log import StageLog
from .checkpoints import Checkpoints
from .non_finite import find_non_finite, non_finite_error
from .stage_run import StageRun
from .state import TrainingState
from .trainee import Trainee


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), and has saved its state."""


class Microbatch(Protocol):
    """The inputs of one forward and backward pass on this rank."""

    @property
    def tokens(self) -> int: ...


MicrobatchT = TypeVar("MicrobatchT", bound=Microbatch)


class Objective(Protocol[MicrobatchT]):
    """The task of a student: microbatches, losses and measurements. All methods are called on every rank alike.

    name             stands in messages, such as "Stage shared"
    steps_before     steps that the stage's log has before this objective's first
    saves_last_step  True if the last step gets a checkpoint; else its result is written as soon as the loop ends
    """

    name: str
    steps_before: int
    saves_last_step: bool
    routers: RouterTraining

    def begin(self, start: int, log: StageLog) -> None:
        """Called once, ahead of step `start` + 1."""

    def microbatches(self, step: int) -> Iterator[MicrobatchT]:
        """Yield this rank's microbatches of a step, counted from 1."""

    def losses(self, microbatch: MicrobatchT) -> StepLosses:
        """Run the forward pass, with a graph. It may run again on the same microbatch, to find a value that is not finite."""

    def record(self, microbatch: MicrobatchT, step: int) -> None:
        """Count what the routers chose in the forward pass of `losses`, if this step's choices are counted."""

    def due(self, step: int) -> bool:
        """Tell whether `measure` has anything to do."""

    def measure(self, step: int, log: StageLog) -> None:
        """Measure the student after a step, and before the first as of step 0.

        It has its averaged weights meanwhile, where the run keeps an average.
        """


@dataclass(kw_only=True, slots=True, frozen=True)
class StepResult:
    """Mean losses (on the device) and number of tokens of one step over all ranks, and what the host has read of it:

    norm  the norm of the gradients
    stop  whether any rank has been asked to stop
    """

    losses: dict[str, Tensor]
    tokens: int
    norm: float
    stop: bool


class TrainingLoop(Generic[MicrobatchT]):
    """The steps of a student towards an objective, with accumulation, checkpoints, resuming and logging.

    The host waits for the device once a step, ahead of the optimizer: so it is never more than a step ahead of it.
    """

    def __init__(
        self, stage_run: StageRun, trainee: Trainee, objective: Objective[MicrobatchT], checkpoints: Checkpoints
    ) -> None:
        self.run, self.ranks, self.steps = stage_run.run, stage_run.ranks, stage_run.section.steps
        self.trainee, self.objective, self.checkpoints = trainee, objective, checkpoints
        self.state = TrainingState(
            student=trainee.state,
            schedule=trainee.schedule,
            average=trainee.average,
            fractions=objective.routers.fractions,
            scaler=self.ranks.scaler,
        )

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and return its step; 0 for a new beginning."""
        self.checkpoints.clean()
        start = self.ranks.main_value((self.checkpoints.steps() or [0])[-1])
        if start:
            self.state.load(self.checkpoints, start)
        return start

    def run_steps(self, start: int, log: StageLog) -> None:
        """Train from step `start` + 1 to the last. Raises Stopped after SIGTERM, UserError for a value that is not finite."""
        with log.set_up():
            self.objective.begin(start, log)
            if start == 0 and self.steps > 0:
                with self.trainee.averaged():
                    self.objective.measure(0, log)
        for step in range(start + 1, self.steps + 1):
            result = self._step(step)
            log.step(
                self.objective.steps_before + step,
                result.losses,
                tokens=result.tokens,
                learning_rate=float(self.trainee.schedule.get_last_lr()[0]),
                grad_norm=result.norm,
            )
            self.trainee.update(step)
            self.objective.routers.end_step()
            with log.paused():
                self._save(step, log, result.stop)
                if self.objective.due(step):
                    with self.trainee.averaged():
                        self.objective.measure(step, log)

    def _step(self, step: int) -> StepResult:
        """Run forward and backward of one optimizer step. Raises UserError for a loss or gradient that is not finite."""
        microbatches: list[MicrobatchT] = []
        parts: list[dict[str, Tensor]] = []
        norm = torch.full((), math.nan, device=self.ranks.device)
        for microbatch in self.objective.microbatches(step):
            with self.ranks.accumulate(self.trainee.called):
                losses = self.objective.losses(microbatch)
                self.objective.record(microbatch, step)
                self.ranks.backward(losses.total)
                self.objective.routers.after_backward()
                if self.ranks.synchronising:
                    norm = self.ranks.clip(list(self.trainee.trained.values()), self.run.training.max_grad_norm)
            microbatches.append(microbatch)
            parts.append(losses.parts)
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        signals = {f"microbatch {number}": ~part["total"].isfinite() for number, part in enumerate(parts)}
        signals["stop"] = self.ranks.stop_request()
        shared = self.ranks.averages({**means, **signals})
        # The host's one wait.
        gradient_norm, *read = torch.stack([norm.float(), *(shared[name].float() for name in signals)]).tolist()
        *failed, stop = (value > 0 for value in read)
        if not any(failed) and not math.isfinite(gradient_norm) and self.ranks.scaler is None:
            failed[-1] = True  # fp16's scaler skips such steps
        if any(failed):
            raise self._not_finite(microbatches[failed.index(True)], step)
        return StepResult(
            losses={name: shared[name] for name in means},
            tokens=self.ranks.count * sum(microbatch.tokens for microbatch in microbatches),
            norm=gradient_norm,
            stop=stop,
        )

    def _save(self, step: int, log: StageLog, stop: bool) -> None:
        """Save where a checkpoint is due or the run is to stop."""
        last, logged = step == self.steps, self.objective.steps_before + step
        stop = stop and not last
        due = self.objective.saves_last_step if last else step % self.run.checkpoints.every == 0
        if due or stop:
            self.state.save(self.checkpoints, step)
            log.event("saved", step=logged)
        if stop:
            message = f"{self._where(step)}: stopped and saved; resume=latest goes on there"
            log.event("stopped", step=logged, message=message)
            raise Stopped

    def _not_finite(self, microbatch: MicrobatchT, step: int) -> Exception:
        source = find_non_finite(self.trainee.called, lambda: self.objective.losses(microbatch).total, self.ranks.any)
        saved = self.checkpoints.steps()
        last = str(self.checkpoints.path(saved[-1])) if saved else None
        return non_finite_error(source, where=self._where(step), checkpoint=last)

    def _where(self, step: int) -> str:
        return f"{self.objective.name}, step {step}"

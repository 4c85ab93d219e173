"""Optimizer, learning-rate schedule and the running average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import UserError
from ..run_config import StageSection, TrainingSection

_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


def new_optimizer(
    parameters: Sequence[nn.Parameter], stage: StageSection, training: TrainingSection
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Make the run's form of AdamW, and its schedule over the stage's steps.

    On a GPU it is torch's fused kernel: torch's default there takes memory for one more copy of the trained weights. Under
    fp16, whose scaler could not tell which steps that kernel skips, it goes weight by weight.

    Raises UserError for 8-bit AdamW if bitsandbytes is not installed.
    """
    from diffusers.optimization import get_scheduler

    options: dict[str, Any] = {
        "lr": stage.learning_rate,
        "betas": training.betas,
        "weight_decay": training.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if training.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ModuleNotFoundError:
            raise UserError(
                "training.optimizer is adamw_8bit, but bitsandbytes is not installed: pip install bitsandbytes, "
                "or training.optimizer=adamw_fused."
            ) from None
        optimizer = AdamW8bit(parameters, **options)
    else:
        fused = training.optimizer == "adamw_fused" or all(parameter.is_cuda for parameter in parameters)
        fused = fused and training.mixed_precision != "fp16"
        optimizer = torch.optim.AdamW(parameters, foreach=False, fused=fused, **options)
    warmup = min(training.warmup_steps, stage.steps)
    schedule = get_scheduler(
        _SCHEDULES[training.schedule], optimizer, num_warmup_steps=warmup, num_training_steps=max(stage.steps, 1)
    )
    return optimizer, schedule


def scheduled_rate(step: int, stage: StageSection, training: TrainingSection) -> float:
    """Return the learning rate after `step` steps of a stage."""
    _, schedule = new_optimizer(
        [nn.Parameter(torch.zeros(1))], stage, training.model_copy(update={"optimizer": "adamw"})
    )
    return float(stage.learning_rate * schedule.lr_lambdas[0](step))


class WeightAverage:
    """A running average (EMA) of the trained weights; the decay grows to `decay`, so that the first steps fade fast.

    `parameters` may be this rank's shards, if the model takes its weights from them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Called once per step, counted from 1."""
        update = get_ema_multi_avg_fn(min(self.decay, step / (step + 9)))
        averages: list[Any] = list(self.averages.values())
        update(averages, [parameter.detach() for parameter in self.parameters.values()], step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averages as its weights during the `with`."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            trained: Tensor = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(trained)

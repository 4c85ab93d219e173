"""What a checkpoint holds of a stage: trained weights, thresholds, optimizer, schedule, averages
and how often blocks were chosen.

By parameter name, sharded or not, so that another number of processes can read it (torch.distributed.checkpoint).
Frozen weights are in the file that the stage began with. There is no generator to keep: see loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from .checkpoints import Checkpoints
from .optimizers import Average
from .router_training import RouterTraining

FROZEN = (".neuron_order",)  # buffers that no training changes


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """`model` and `optimizer` as accelerate has prepared them."""

    model: Any
    optimizer: Any
    schedule: LambdaLR
    average: Average | None
    routers: RouterTraining
    scaler: Any = None  # of fp16

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        extra: dict[str, Any] = {"schedule": {"last_epoch": self.schedule.last_epoch}}
        if self.scaler is not None:
            extra["scaler"] = self.scaler.state_dict()
        checkpoints.save(step, self._collect(), extra)

    def load(self, checkpoints: Checkpoints, step: int) -> None:
        state = self._collect()
        extra = checkpoints.load(step, state)
        # The frozen ones are not among them, hence not strict; the checkpoint itself was read strictly.
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self.model, self._optimizer, state["optimizer"])
        if self.average is not None:
            for name, tensor in self.average.averages.items():
                tensor.copy_(state["average"][name])
        for number, tensor in self.routers.fractions.items():
            tensor.copy_(state["fractions"][number])
        if self.scaler is not None:
            self.scaler.load_state_dict(extra["scaler"])
        self.schedule.last_epoch = extra["schedule"]["last_epoch"] - 1
        self.schedule.step()

    @property
    def _optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _collect(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        weights: dict[str, Any] = {
            name: tensor
            for name, tensor in get_model_state_dict(self.model, options=options).items()
            if not name.endswith(FROZEN)
        }
        state: dict[str, Any] = {
            "model": weights,
            "optimizer": get_optimizer_state_dict(self.model, self._optimizer),
        }
        if self.average is not None:
            state["average"] = dict(self.average.averages)
        if self.routers.fractions:
            state["fractions"] = dict(self.routers.fractions)
        return state

"""What a checkpoint holds of a stage: trained weights, thresholds, optimizer, schedule and averages.

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

FROZEN = (".neuron_order",)  # buffers that no training changes


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """`model` and `optimizer` as accelerate has prepared them."""

    model: Any
    optimizer: Any
    schedule: LambdaLR
    average: Average | None

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        checkpoints.save(step, self._collect(), {"schedule": {"last_epoch": self.schedule.last_epoch}})

    def load(self, checkpoints: Checkpoints, step: int) -> None:
        state = self._collect()
        extra = checkpoints.load(step, state)
        # The frozen ones are not among them, hence not strict; the checkpoint itself was read strictly.
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self.model, self._optimizer, state["optimizer"])
        if self.average is not None:
            for name, tensor in self.average.averages.items():
                tensor.copy_(state["average"][name])
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
        return state

"""What a checkpoint holds of a stage: trained weights, thresholds, optimizer, schedule, averages
and how often blocks were chosen.

By parameter name, sharded or not, so that another number of processes can read it (torch.distributed.checkpoint).
Frozen weights are in the file that the stage began with. There is no generator to keep: see loop.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from ..distillation.router_losses import RouterTraining
from ..parallel.zero import Zero
from .checkpoints import Checkpoints
from .optimizers import Average

FROZEN = (".neuron_order",)  # buffers that no training changes


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """`model` and `optimizer` as `Ranks.prepare` gave them. Under DeepSpeed `zero` is what has them, and `trained` the
    parameters that it trains."""

    model: Any
    optimizer: Any
    schedule: LambdaLR
    average: Average | None
    routers: RouterTraining
    scaler: Any = None  # of fp16
    zero: Zero | None = None
    trained: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        extra: dict[str, Any] = {"schedule": {"last_epoch": self.schedule.last_epoch}}
        if self.scaler is not None:
            extra["scaler"] = self.scaler.state_dict()
        if self.zero is None:
            state = self._collect()
        else:
            state = self.zero.collect(self.trained, self._averages)
            state["model"] |= self._buffers()
            state |= self._fractions()
        checkpoints.save(step, state, extra)

    def load(self, checkpoints: Checkpoints, step: int) -> None:
        if self.zero is None:
            extra = self._load_collected(checkpoints, step)
        else:
            self.zero.restore(self.trained, self._averages, lambda part: checkpoints.load(step, part))
            extra = checkpoints.load(step, {"model": self._buffers(), **self._fractions()})  # which they are read into
        if self.scaler is not None:
            self.scaler.load_state_dict(extra["scaler"])
        self.schedule.last_epoch = extra["schedule"]["last_epoch"] - 1
        self.schedule.step()

    def _load_collected(self, checkpoints: Checkpoints, step: int) -> dict[str, Any]:
        state = self._collect()
        extra = checkpoints.load(step, state)
        # The frozen ones are not among them, hence not strict; the checkpoint itself was read strictly.
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self.model, self._optimizer, state["optimizer"])
        for name, tensor in self._averages.items():
            tensor.copy_(state["average"][name])
        for number, tensor in self.routers.fractions.items():
            tensor.copy_(state["fractions"][number])
        return extra

    @property
    def _optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _averages(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.averages

    def _fractions(self) -> dict[str, Any]:
        return {"fractions": dict(self.routers.fractions)} if self.routers.fractions else {}

    def _buffers(self) -> dict[str, Tensor]:
        """Those that files have too, and the same on every rank: a capacity router's."""
        model: Any = self.routers.core
        stored = model.state_dict()
        return {name: stored[name] for name, _ in model.named_buffers() if name in stored and not name.endswith(FROZEN)}

    def _collect(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        weights: dict[str, Any] = {
            name: tensor
            for name, tensor in get_model_state_dict(self.model, options=options).items()
            if not name.endswith(FROZEN)
        }
        state: dict[str, Any] = {"model": weights, "optimizer": get_optimizer_state_dict(self.model, self._optimizer)}
        if self.average is not None:
            state["average"] = dict(self.average.averages)
        return state | self._fractions()

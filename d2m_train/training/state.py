"""The state of a stage in its checkpoints: trained weights, thresholds, optimizer, schedule, weight averages, and how
often blocks were chosen.

Frozen weights are in the file that the stage began with. There is no random generator to keep: see loop.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..parallel.student_state import StudentState
from .checkpoints import Checkpoints
from .optimizers import WeightAverage


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """All that changes from step to step. `fractions`: of each block group, how often its blocks ran in the last step."""

    student: StudentState
    schedule: LambdaLR
    average: WeightAverage | None
    fractions: Mapping[str, Tensor]
    scaler: Any = None  # of fp16

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        extra: dict[str, Any] = {"schedule": {"last_epoch": self.schedule.last_epoch}}
        if self.scaler is not None:
            extra["scaler"] = self.scaler.state_dict()
        checkpoints.save(step, self.student.collect(self._averages) | self._fractions(), extra)

    def load(self, checkpoints: Checkpoints, step: int) -> None:
        self.student.restore(self._averages, lambda state: checkpoints.load(step, state))
        extra = checkpoints.load(step, self._fractions())
        if self.scaler is not None:
            self.scaler.load_state_dict(extra["scaler"])
        self.schedule.last_epoch = extra["schedule"]["last_epoch"] - 1
        self.schedule.step()

    @property
    def _averages(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.averages

    def _fractions(self) -> dict[str, Any]:
        return {"fractions": dict(self.fractions)} if self.fractions else {}

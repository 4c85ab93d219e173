"""The plan of a run: parameters, FLOPs, memory, disk and tokens, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from d2m_model.cost import Cost, Tokens

from ..run_config import Stage
from .memory import Strategy

GIB = 2**30


@dataclass(kw_only=True, slots=True, frozen=True)
class StageEstimate:
    """One training stage. `memory` is in bytes of one GPU, by part; `flops` are those of one sample's training step."""

    stage: Stage
    steps: int
    trained: int
    samples: int
    tokens: int
    flops: float
    memory: dict[str, int]
    checkpoint: int  # bytes of one
    parts: tuple[int, ...] = ()  # bytes in the file of each part that blockwise mode trains by itself

    @property
    def gpu_memory(self) -> int:
        return sum(self.memory.values())


@dataclass(kw_only=True, slots=True, frozen=True)
class RunPlan:
    """A run before it has begun. Sizes are in bytes: `host` is memory beside the GPU, `disk` is named by what is written.

    `seconds`: time of each stage's steps; empty where no step of the run has been measured.
    """

    title: str
    processes: int
    strategy: Strategy
    tokens: Tokens
    dense: Cost
    student: Cost
    stages: tuple[StageEstimate, ...]
    host: dict[str, int]
    disk: dict[str, int]
    gpu_memory: int | None
    seconds: dict[Stage, float]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """True if every stage fits into the GPU's memory; None where that memory is not known."""
        if self.gpu_memory is None:
            return None
        return all(stage.gpu_memory <= self.gpu_memory for stage in self.stages)

"""A training stage as a run orders it: what it reads, where it writes, and which ranks take part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.batch import DataSource
from ..monitor.stage_log import StageLog
from ..monitor.tensorboard import describe_stage
from ..parallel.ranks import Ranks
from ..run_config import RunConfig, Stage, StageSection
from .checkpoints import Checkpoints

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


@dataclass(kw_only=True, slots=True, frozen=True)
class StageRun:
    """A stage that begins with the student in `source` and writes the one in `student`.

    `identity` is all that the stage's result depends on (run_identity.stage_identity).
    """

    run: RunConfig
    stage: Stage
    source: Path
    folder: Path
    tensorboard: Path
    ranks: Ranks
    teacher: FluxTransformer2DModel
    data: DataSource
    identity: dict[str, Any]

    @property
    def student(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def section(self) -> StageSection:
        section: StageSection = getattr(self.run.stage, self.stage)
        return section

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of trained weights."""
        dtype: torch.dtype = getattr(torch, self.run.student.dtype)
        return dtype

    def checkpoints(self, folder: Path, **further_identity: Any) -> Checkpoints:
        """The checkpoints in `folder`, bound to the stage's identity and to what distinguishes them within the stage."""
        return Checkpoints(
            folder,
            self.identity | further_identity,
            keep=self.run.checkpoints.keep,
            main=self.ranks.main,
            wait=self.ranks.wait,
        )

    def open_log(self, *, steps: int, start: int) -> StageLog:
        return StageLog(
            self.folder,
            self.tensorboard,
            self.run.eyes,
            stage=self.stage,
            steps=steps,
            start=start,
            main=self.ranks.main,
            run_name=self.run.output_dir.name,
            describe=lambda writer: describe_stage(writer, self.run, self.stage, self.ranks.count),
        )

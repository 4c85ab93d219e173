"""Time of a run's stages, from the speed of the steps that it has logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ..monitor.stage_log import LOG_FILE, read_stage_log
from ..run_config import Stage
from .run_plan import StageEstimate


def stage_seconds(output_dir: Path, stages: Sequence[StageEstimate]) -> dict[Stage, float]:
    """Return the seconds that each stage's steps take; empty if the run in `output_dir` has logged none.

    A stage without a step of its own is taken to run as many FLOPs a second as the last one that has.
    """
    speeds: dict[Stage, float] = {}
    for stage in stages:
        rates = [
            line["tokens_per_second"]
            for line in read_stage_log(output_dir / stage.stage / LOG_FILE)
            if line.get("tokens_per_second")
        ]
        if rates and stage.tokens:
            # The first interval has what is made once: kernels, compiled blocks, the allocator's memory.
            speeds[stage.stage] = median(rates[1:] or rates) * stage.flops * stage.samples / stage.tokens
    if not speeds:
        return {}
    last = list(speeds.values())[-1]
    return {stage.stage: stage.flops * stage.samples / speeds.get(stage.stage, last) for stage in stages}

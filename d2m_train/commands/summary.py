"""Lines that a run prints before its first stage and after its last."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import UserError
from ..data.batch import DataSource
from ..data.pictures import PictureSource
from ..plan.estimate import plan_run
from ..plan.run_plan import GIB
from ..progress import duration
from ..run_config import RunConfig, Stage

_BUCKETS = 6  # named ones


def begin_text(run: RunConfig, data: DataSource, stages: Sequence[Stage], processes: int) -> str:
    """Describe samples, buckets, global batch, and the steps of the training stages."""
    training = run.training
    batch = training.batch_size * training.accumulation * processes
    lines = [f"{data.name}: {data.split_text()}"]
    if isinstance(data, PictureSource):
        buckets = sorted(data.buckets(), key=lambda bucket: -bucket[1])
        named = [f"{width} × {height} ({count:,})" for (width, height), count in buckets[:_BUCKETS]]
        more = f" and {len(buckets) - _BUCKETS} more" if len(buckets) > _BUCKETS else ""
        lines.append(f"Buckets: {', '.join(named)}{more}.")
    if stages:
        steps = ", ".join(f"{stage} {getattr(run.stage, stage).steps:,}" for stage in stages)
        lines.append(
            f"Global batch: {training.batch_size} × {training.accumulation} accumulated × {_processes(processes)} = {batch} "
            f"samples. Steps{' of each block' if training.blockwise else ''}: {steps}."
        )
    return "\n".join(lines)


def device_text(device: torch.device, processes: int, strategy: str) -> str:
    """Describe the devices of a run."""
    many = _processes(processes) + (f", {strategy}" if processes > 1 else "")
    if device.type != "cuda":
        return f"{many}, on the CPU ({torch.get_num_threads()} threads each)."
    of = torch.cuda.get_device_properties(device)
    return f"{many}, each on a GPU such as {of.name} ({of.total_memory / GIB:.1f} GiB)."


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def memory_text(run: RunConfig, processes: int, strategy: str) -> str | None:
    """Describe the planned memory of a GPU by stage; None where it cannot be planned."""
    try:
        plan = plan_run(run, processes=processes, strategy=None if processes == 1 else strategy)
    except UserError:
        return None
    stages = ", ".join(f"{stage.stage} {stage.gpu_memory / GIB:.1f} GiB" for stage in plan.stages)
    return f"Planned memory of a GPU: {stages}." if stages else None


def end_text(run: RunConfig, file: Path, seconds: float, device: torch.device) -> str:
    """Describe a finished run: time, peak memory, file, and the command that comes next."""
    lines = [f"Done in {duration(seconds)}. {peak_memory(device)}", f"{file}: {file.stat().st_size / GIB:.2f} GiB."]
    command = ["evaluate", str(file), "--teacher", str(run.teacher.path), "--data"]
    if run.data.source == "emoji":
        command.append("emoji")
    else:
        command.append(str(run.data.path) if run.data.source == "prompts" else "PROMPTS.txt")
        if run.data.text_encoders is not None:
            command += ["--text-encoders", run.data.text_encoders]
    lines.append(f"Next: python -m d2m_train {shlex.join(command)}")
    return "\n".join(lines)


def peak_memory(device: torch.device) -> str:
    """Describe the most memory that this process has had."""
    parts = []
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB of the GPU")
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        parts.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.2f} GiB of the host")
    return f"Peak memory of the main process: {', '.join(parts)}." if parts else ""

"""The plan of a run as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from d2m_model.cost import Cost

from ..progress import duration
from .run_plan import GIB, RunPlan, StageEstimate

# Options to try, by the part of the memory that is the largest.
_ADVICE = {
    "student's weights": "student.frozen_dtype=bfloat16, FSDP2 over more GPUs, or training.blockwise=true",
    "teacher's weights": "teacher.quantise=fp8, or in place of it teacher.offload=cpu or teacher.offload=stream",
    "gradients": "FSDP2 over more GPUs, or training.blockwise=true",
    "optimizer": "training.optimizer=adamw_8bit, FSDP2 over more GPUs, or training.blockwise=true",
    "average": "training.ema=null",
    "activations": "training.gradient_checkpointing=true, training.mixed_precision=bf16 or a smaller training.batch_size",
    "one block's, computed again": "training.mixed_precision=bf16 or a smaller training.batch_size",
    "block outputs to compare": "training.mixed_precision=bf16 or a smaller training.batch_size",
    "exchanged gradients": "FSDP2 instead of DDP",
    "gathered blocks": "student.frozen_dtype=bfloat16",
    "more while it is loaded": "FSDP2 in place of ZeRO",
}


def plan_text(plan: RunPlan) -> str:
    """Render the plan, with a verdict on the GPU's memory."""
    many = f"{plan.processes} GPUs, {plan.strategy}" if plan.processes > 1 else "one GPU (or CPU)"
    lines = [
        f"{plan.title}; {many}; samples of {plan.tokens.image:,} image and {plan.tokens.text:,} text tokens",
        "",
        f"Parameters: {_count(plan.student.total)} in all (teacher {_count(plan.dense.total)}); activated "
        f"{_count(plan.student.touched)} touched, {_count(plan.student.paper)} as the paper counts them",
        f"FLOPs of one sample: teacher {_flops(plan.dense)}, student {_flops(plan.student)} "
        f"({plan.student.flops / plan.dense.flops:.3f} of it)",
    ]
    if plan.stages:
        lines += ["", *_stages(plan), "", _time(plan)]
    lines += ["", f"Disk: {_size(sum(plan.disk.values()))}"]
    lines += [f"  {name}: {_size(size)}" for name, size in plan.disk.items()]
    lines += [f"Host memory for {name}: {_size(size)}" for name, size in plan.host.items()]
    lines += [f"Note: {note}" for note in plan.notes]
    return "\n".join([*lines, "", *_verdict(plan)]).rstrip()


def _stages(plan: RunPlan) -> list[str]:
    """Render a table with a column per stage, and memory by part."""
    stages = plan.stages
    parts = list(dict.fromkeys(part for stage in stages for part in stage.memory))
    unit = GIB if max(stage.gpu_memory for stage in stages) >= GIB else 2**20

    def row(name: str, value: Callable[[StageEstimate], str]) -> list[str]:
        return [name, *map(value, stages)]

    rows = [
        row("stage", lambda stage: stage.stage),
        row("steps", lambda stage: f"{stage.steps:,}"),
        row("samples", lambda stage: f"{stage.samples:,}"),
        row("tokens to process", lambda stage: _count(stage.tokens)),
        row("trained parameters", lambda stage: f"{stage.trained:,}"),
        row("FLOPs of a sample's step", lambda stage: f"{stage.flops / 1e12:,.3f} T"),
        row(f"memory of a GPU, {'GiB' if unit == GIB else 'MiB'}", lambda stage: ""),
        *([f"  {part}", *(f"{stage.memory.get(part, 0) / unit:,.2f}" for stage in stages)] for part in parts),
        row("  together", lambda stage: f"{stage.gpu_memory / unit:,.2f}"),
    ]
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return [_aligned(line, widths) for line in rows]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = cells
    return "  ".join(
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    ).rstrip()


def _time(plan: RunPlan) -> str:
    if not plan.seconds:
        return (
            "Time: not known. Start the run, stop it after a few dozen steps (Ctrl-C saves them; resume=latest goes on there), "
            "and ask again: their speed is then counted on."
        )
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in plan.seconds.items())
    return (
        f"Time: {stages}; {duration(sum(plan.seconds.values()))} together, at the speed of the steps that this run has logged, "
        "without validation, images and checkpoints."
    )


def _verdict(plan: RunPlan) -> list[str]:
    if not plan.stages:
        return []
    worst = max(plan.stages, key=lambda stage: stage.gpu_memory)
    needs = f"stage {worst.stage} needs {_size(worst.gpu_memory)} on each GPU"
    if plan.gpu_memory is None:
        return [f"How much memory a GPU has is not known (--gpu-memory 24GB says it): {needs}."]
    if plan.fits:
        spare = plan.gpu_memory - worst.gpu_memory
        return [
            f"It fits: {needs} of {_size(plan.gpu_memory)}; {_size(spare)} are left for libraries, kernels and gaps."
        ]
    part = max(worst.memory, key=lambda part: worst.memory[part])
    return [
        f"It does not fit: {needs} of {_size(plan.gpu_memory)}. "
        f"Most of it is {part} ({_size(worst.memory[part])}): try {_ADVICE[part]}."
    ]


def _count(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:,.2f} {name}"
    return f"{value:,.0f}"


def _flops(cost: Cost) -> str:
    return f"{cost.flops / 1e12:,.3f} T" if cost.flops >= 1e9 else f"{cost.flops / 1e6:,.1f} M"


def _size(value: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:,.2f} {name}"
    return f"{value:,.0f} bytes"

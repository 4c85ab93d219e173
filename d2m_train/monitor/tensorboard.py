"""Order of TensorBoard's charts, and beside the measurements the hyperparameters and the run's text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..run_config import RunConfig, Stage
from .validation import VALIDATION_LOSS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LAYOUT = {
    "Losses": {
        "validation": ["Multiline", ["validation/(loss|data)"]],
        "validation by noise level": ["Multiline", ["validation/t.*"]],
        "training": ["Multiline", ["loss/.*"]],
    },
    "Routers": {
        "load": ["Multiline", ["router/(load_entropy|largest_load|dead_experts)"]],
        "blocks that ran": ["Multiline", ["router/block_groups.*/block_.*"]],
    },
    "Speed": {"tokens per second": ["Multiline", ["tokens_per_second"]]},
}


def describe_stage(writer: SummaryWriter, run: RunConfig, stage: Stage, processes: int) -> None:
    """Write layout, hyperparameters and the run's YAML for one stage."""
    from torch.utils.tensorboard.summary import hparams

    writer.add_custom_scalars(_LAYOUT)
    writer.add_text("run", "\n".join(f"    {line}" for line in run.to_yaml().splitlines()))  # as code
    section, training = getattr(run.stage, stage), run.training
    values = {
        "stage": stage,
        "steps": section.steps,
        "learning_rate": section.learning_rate,
        "global_batch": training.batch_size * training.accumulation * processes,
        "preset": run.student.preset,
        "top_k": run.student.top_k,
        "router": run.student.router,
        "feature": run.losses.feature,
        "balance": run.losses.balance,
        "schedule": training.schedule,
        "weight_decay": training.weight_decay,
        "ema": training.ema or 0.0,
        "mixed_precision": training.mixed_precision,
        "blockwise": training.blockwise,
        "seed": run.seed,
    }
    # Beside the stage's measurements: SummaryWriter.add_hparams would open a folder of its own for them.
    for summary in hparams(values, {VALIDATION_LOSS: 0.0}):
        writer._get_file_writer().add_summary(summary)

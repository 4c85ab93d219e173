"""Whether a DeepSpeed configuration says what the run says: two files tell of the same batches, precision and clipping.

Of what both could set, the run decides; where DeepSpeed's says something else, training would silently follow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import UserError
from .run_config import RunConfig

UNTESTED = (
    "Training under DeepSpeed is untested (there was no GPU to run it on): its checkpoints are in parts of DeepSpeed's "
    "own, from which a run cannot go on."
)
AUTO = "auto"
# What accelerate puts in place of `auto`, whatever the run says.
AUTO_CLIPPING = 1.0


def check_deepspeed(config: Mapping[str, Any], run: RunConfig) -> None:
    """`config`: DeepSpeed's, as accelerate's plugin has it (`deepspeed_plugin.deepspeed_config`).

    Raises UserError with a line for whatever does not fit the run: what was found, what was expected, what to do.
    """
    if problems := list(_problems(config, run)):
        raise UserError("\n".join(f"DeepSpeed's {problem}" for problem in problems))


def _problems(config: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    training = run.training
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage")
    if not _is(stage, 2) and not _is(stage, 3):
        yield (
            f"zero_optimization.stage is {stage}; expected 2 or 3: set zero_stage in accelerate's file, "
            "or use configs/accelerate/ddp.yaml, which shares nothing."
        )
    for name, field, value in (
        ("gradient_accumulation_steps", "training.accumulation", training.accumulation),
        ("train_micro_batch_size_per_gpu", "training.batch_size", training.batch_size),
    ):
        found = config.get(name)
        if found != AUTO and not _is(found, value):
            yield f"{name} is {found}; expected auto, or {field}, which is {value}: make it auto or {value}."
    for name, ours in (
        ("optimizer", "training.optimizer and stage.*.learning_rate"),
        ("scheduler", "training.schedule"),
    ):
        if config.get(name):
            yield f"{name} section is {config[name]}; expected none, since {ours} decide: take the section out."
    for name in ("bf16", "fp16"):
        enabled = _section(config, name).get("enabled", AUTO)
        expected = training.mixed_precision == name
        if enabled != AUTO and enabled is not expected:
            yield (
                f"{name}.enabled is {enabled}; expected {expected}, as training.mixed_precision is "
                f"{training.mixed_precision}: make it auto, or change training.mixed_precision."
            )
    yield from _clipping(config.get("gradient_clipping", 0.0), training.max_grad_norm)
    device = _section(zero, "offload_optimizer").get("device") or "none"
    if device != "none" and training.optimizer == "adamw_8bit":
        yield (
            f"zero_optimization.offload_optimizer.device is {device}; expected none with training.optimizer adamw_8bit, "
            "which DeepSpeed would exchange for its own: make it none, or training.optimizer=adamw."
        )


def _clipping(found: Any, maximum: float | None) -> Iterator[str]:
    """DeepSpeed takes 0 for no clipping, the run null."""
    clips_at = AUTO_CLIPPING if found == AUTO else found
    if not _is(clips_at, 0.0 if maximum is None else maximum):
        meaning = f" (with accelerate that is {AUTO_CLIPPING})" if found == AUTO else ""
        wanted = "0, as training.max_grad_norm is null" if maximum is None else f"training.max_grad_norm, {maximum}"
        ours = "null" if _is(clips_at, 0.0) else clips_at
        yield (
            f"gradient_clipping is {found}{meaning}; expected {wanted}: change gradient_clipping, "
            f"or training.max_grad_norm={ours}."
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is(found: Any, value: float) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and found == value

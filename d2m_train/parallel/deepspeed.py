"""DeepSpeed's configuration for a run, and whether it says what the run says: two files tell of the same batches,
precision and clipping.

Of what both could set, the run decides; where DeepSpeed's says something else, training would silently follow it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from .. import UserError
from ..run_config import RunConfig

AUTO = "auto"
ASKED = "ACCELERATE_USE_DEEPSPEED"
# Ways of sharing weights out, and of sending them in less precision, that checkpoints and averages know nothing of.
UNKNOWN = ("zero_hpz_", "zero_quantized_", "mics_")
# What accelerate puts in place of `auto`, whatever the run says.
AUTO_CLIPPING = 1.0


def deepspeed_requested() -> bool:
    """Whether accelerate's configuration says DeepSpeed."""
    return os.environ.get(ASKED, "false").lower() in ("true", "1")


@contextmanager
def without_accelerates_deepspeed() -> Iterator[None]:
    """accelerate sets up the processes as for DDP, since it knows no DeepSpeed on a CPU: what a CPU tries, a GPU runs."""
    before = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[ASKED] = before


def configuration(run: RunConfig) -> dict[str, Any]:
    """For deepspeed.initialize: what accelerate's configuration says, and of the run what it leaves open.

    Raises UserError if DeepSpeed is not installed, or for what does not fit the run.
    """
    if find_spec("deepspeed") is None:
        raise UserError(
            "accelerate's configuration asks for DeepSpeed, which is not installed: pip install deepspeed, "
            "or use configs/accelerate/fsdp2.yaml, which shares the same memory."
        )
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(run.training.mixed_precision)
    check_deepspeed(plugin.deepspeed_config, run)
    return complete_config(plugin.deepspeed_config, run)


def complete_config(config: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    """A configuration that fits, with nothing left open."""
    training = run.training
    complete: dict[str, Any] = _without_auto(config) | {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # one that would have to be compiled
        # Mixed precision is autocast's, over weights in float32.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    complete.pop("train_batch_size", None)  # the product of the others
    if complete["zero_optimization"]["stage"] == 3:
        # Small parameters too lie in parts alone, where averages can take their place.
        complete["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return complete


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed has defaults of its own for whatever accelerate would find out."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != AUTO
    }


def check_deepspeed(config: Mapping[str, Any], run: RunConfig) -> None:
    """`config`: DeepSpeed's, as accelerate's plugin has it (`deepspeed_plugin.deepspeed_config`).

    Raises UserError with a line for whatever does not fit the run: what was found, what was expected, what to do.
    """
    problems = [f"DeepSpeed's {problem}" for problem in _problems(config, run)] + list(_problems_of_the_run(run))
    if problems:
        raise UserError("\n".join(problems))


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
    for name in ("offload_optimizer", "offload_param"):
        if (device := _section(zero, name).get("device") or "none") not in ("none", "cpu"):
            yield f"zero_optimization.{name}.device is {device}; expected none or cpu: checkpoints do not reach there."
    for name in sorted(zero):
        if name.startswith(UNKNOWN) and zero[name] not in (False, None, 1, -1):
            yield f"zero_optimization.{name} is {zero[name]}; expected none, since checkpoints do not know it: take it out."


def _problems_of_the_run(run: RunConfig) -> Iterator[str]:
    """What the run asks for and has no form under DeepSpeed here."""
    training = run.training
    if training.mixed_precision == "fp16":
        yield "training.mixed_precision is fp16; expected bf16 or no with DeepSpeed: give one of them."
    if training.optimizer == "adamw_8bit":
        yield "training.optimizer is adamw_8bit; expected adamw or adamw_fused with DeepSpeed: give one of them."
    for name, dtype in (("dtype", run.student.dtype), ("frozen_dtype", run.student.frozen_dtype)):
        if dtype not in (None, "float32"):
            yield (
                f"student.{name} is {dtype}; expected float32 with DeepSpeed, which holds all weights in one type: "
                f"student.{name}=float32, or configs/accelerate/fsdp2.yaml."
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

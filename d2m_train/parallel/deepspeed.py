"""DeepSpeed's configuration, checked against the run's: both files may set batch sizes, precision and clipping.

The run's values count. A DeepSpeed configuration that says something else is refused, since training would silently
follow it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from .. import UserError
from ..run_config import RunConfig

_AUTO = "auto"
_ENABLED = "ACCELERATE_USE_DEEPSPEED"
# Options that shard weights in other ways or send them in lower precision; checkpoints and averages do not support them.
_UNSUPPORTED = ("zero_hpz_", "zero_quantized_", "mics_")
# accelerate replaces `auto` by this value, whatever the run says.
_AUTO_CLIPPING = 1.0


def deepspeed_requested() -> bool:
    """Return whether accelerate's configuration asks for DeepSpeed."""
    return os.environ.get(_ENABLED, "false").lower() in ("true", "1")


@contextmanager
def without_accelerates_deepspeed() -> Iterator[None]:
    """Let accelerate set up the processes as for DDP: it has no DeepSpeed on a CPU, where tests run what a GPU runs."""
    before = os.environ.pop(_ENABLED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_ENABLED] = before


def configuration(run: RunConfig) -> dict[str, Any]:
    """Return the configuration for deepspeed.initialize: accelerate's, completed by the run's values.

    Raises UserError if DeepSpeed is not installed, or if its configuration does not fit the run.
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
    """Complete a configuration that fits the run, so that nothing is left to `auto`."""
    training = run.training
    complete: dict[str, Any] = _without_auto(config) | {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled
        # Mixed precision is autocast's; weights stay float32.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    complete.pop("train_batch_size", None)  # the product of the others
    if complete["zero_optimization"]["stage"] == 3:
        # Shard small parameters too: weight averages are exchanged with the shards.
        complete["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return complete


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop `auto` values, for which DeepSpeed has defaults of its own."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != _AUTO
    }


def check_deepspeed(config: Mapping[str, Any], run: RunConfig) -> None:
    """Check DeepSpeed's configuration, as accelerate's plugin holds it (`deepspeed_plugin.deepspeed_config`).

    Raises UserError with a line for each value that does not fit the run: the value, the expected one, and what to do.
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
            "or use configs/accelerate/ddp.yaml, which shards nothing."
        )
    for name, field, value in (
        ("gradient_accumulation_steps", "training.accumulation", training.accumulation),
        ("train_micro_batch_size_per_gpu", "training.batch_size", training.batch_size),
    ):
        configured = config.get(name)
        if configured != _AUTO and not _is(configured, value):
            yield f"{name} is {configured}; expected auto, or {field}, which is {value}: make it auto or {value}."
    for name, ours in (
        ("optimizer", "training.optimizer and stage.*.learning_rate"),
        ("scheduler", "training.schedule"),
    ):
        if config.get(name):
            yield f"{name} section is {config[name]}; expected none, since {ours} decide: take the section out."
    for name in ("bf16", "fp16"):
        enabled = _section(config, name).get("enabled", _AUTO)
        expected = training.mixed_precision == name
        if enabled != _AUTO and enabled is not expected:
            yield (
                f"{name}.enabled is {enabled}; expected {expected}, as training.mixed_precision is "
                f"{training.mixed_precision}: make it auto, or change training.mixed_precision."
            )
    yield from _clipping(config.get("gradient_clipping", 0.0), training.max_grad_norm)
    for name in ("offload_optimizer", "offload_param"):
        if (device := _section(zero, name).get("device") or "none") not in ("none", "cpu"):
            yield f"zero_optimization.{name}.device is {device}; expected none or cpu: checkpoints do not reach there."
    for name in sorted(zero):
        if name.startswith(_UNSUPPORTED) and zero[name] not in (False, None, 1, -1):
            yield f"zero_optimization.{name} is {zero[name]}; expected none, since checkpoints do not know it: take it out."


def _problems_of_the_run(run: RunConfig) -> Iterator[str]:
    """Yield options of the run that are not supported with DeepSpeed."""
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


def _clipping(configured: Any, maximum: float | None) -> Iterator[str]:
    """Compare clipping: DeepSpeed means no clipping by 0, the run by null."""
    clips_at = _AUTO_CLIPPING if configured == _AUTO else configured
    if not _is(clips_at, 0.0 if maximum is None else maximum):
        meaning = f" (with accelerate that is {_AUTO_CLIPPING})" if configured == _AUTO else ""
        wanted = "0, as training.max_grad_norm is null" if maximum is None else f"training.max_grad_norm, {maximum}"
        ours = "null" if _is(clips_at, 0.0) else clips_at
        yield (
            f"gradient_clipping is {configured}{meaning}; expected {wanted}: change gradient_clipping, "
            f"or training.max_grad_norm={ours}."
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is(configured: Any, value: float) -> bool:
    return isinstance(configured, int | float) and not isinstance(configured, bool) and configured == value

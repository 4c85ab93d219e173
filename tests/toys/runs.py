"""Distillation runs small enough for tests: a random FLUX of a few blocks, a file of latents, and the real command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from d2m_model.config import FluxDims
from d2m_train.monitor.stage_log import read_stage_log
from tests.toys import teachers
from tests.toys.trainer_process import ENVIRONMENT, ROOT, Result, Run

# As few blocks as preset S needs: one dense, a group of three double, a group of five single.
DIMS = replace(teachers.DIMS, double_blocks=4, single_blocks=6)
FLAT = replace(DIMS, double_blocks=2, single_blocks=2)  # for preset L: blocks cost a run more time than width


def write_inputs(folder: Path, dims: FluxDims = DIMS) -> None:
    """`teacher.safetensors` and `latents.safetensors`, of which a third of the text tokens are padding."""
    save_file(teachers.dense_flux(dims, torch.float32), folder / "teacher.safetensors")
    write_latents(folder)


def write_latents(folder: Path) -> None:
    """`latents.safetensors`, for a FLUX with the widths of DIMS."""
    generator = torch.Generator().manual_seed(3)
    samples = 24
    latents = {
        "latents": torch.randn(samples, 16, 8, 8, generator=generator),
        "context": torch.randn(samples, 6, DIMS.context_size, generator=generator),
        "pooled": torch.randn(samples, DIMS.vector_size, generator=generator),
        "text_tokens": torch.full((samples,), 4.0),
    }
    save_file(latents, folder / "latents.safetensors")


def run_file(folder: Path, **sections: Any) -> Path:
    """run.yaml beside the inputs, its sections updated by `sections`; output_dir is `out` within."""
    fields: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "teacher": {"path": str(folder / "teacher.safetensors"), "dtype": "float32"},
        "student": {"preset": "L"},
        "data": {"source": "latents", "path": str(folder / "latents.safetensors")},
        "convert": {"batches": 4, "batch_size": 4, "tokens": 512},
        "stage": {stage: {"steps": 4, "learning_rate": 1e-3} for stage in ("shared", "experts", "blocks")},
        "training": {"batch_size": 2, "warmup_steps": 1},
        "checkpoints": {"every": 2},
        "eyes": {"log_every": 1, "validation_batches": 1, "validation_timesteps": 2, "samples": 0},
    }
    for name, value in sections.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "run-file.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


# Settings that `accelerate launch` gives to its processes.
DDP = {"ACCELERATE_USE_CPU": "true"}
FSDP2 = {
    **DDP,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def zero(stage: int) -> dict[str, str]:
    """Settings of DeepSpeed's ZeRO."""
    return {
        **DDP,
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    }


def distill(file: Path, *overrides: str, ranks: int = 1, env: dict[str, str] | None = None) -> Result:
    """Run `distill` in a process of its own, or in several that share the work as `env` says."""
    return Run(["distill", str(file), *overrides], ranks, env).wait()


def torchrun(arguments: Sequence[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """Start the command in two ranks by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "d2m_train"]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env={**environment(), **env}, stdout=-1, stderr=subprocess.STDOUT, text=True
    )


def steps_logged(folder: Path, stage: str) -> list[int]:
    return [line["step"] for line in read_stage_log(folder / stage / "log.jsonl") if "loss/total" in line]


def wait_for_step(process: Run | subprocess.Popen[str], folder: Path, stage: str, step: int) -> None:
    while step not in steps_logged(folder, stage):
        assert process.poll() is None, "it ended before that step"
        time.sleep(0.02)

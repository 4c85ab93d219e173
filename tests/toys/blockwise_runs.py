"""Runs of blockwise mode small enough for tests, their students made without a conversion, and what is read of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2m_model.config import BlockGroup
from d2m_train.monitor.stage_log import read_stage_log
from tests.toys import files, teachers
from tests.toys.runs import run_file, write_latents

DIMS = replace(teachers.DIMS, double_blocks=3, single_blocks=4)
GROUPS = (
    BlockGroup(kind="double", first=1, blocks=2, active=1, selection="topk"),
    BlockGroup(kind="single", first=1, blocks=2, active=1, selection="topk"),
)
STAGES = ("shared", "experts", "blocks")
SINGLES = tuple(f"single_blocks.{index}" for index in range(4))
STEPS = 4
RATES = {"shared": 3e-3, "experts": 3e-3, "blocks": 3e-4}
TRAINING = {"batch_size": 2, "warmup_steps": 1, "blockwise": True, "blockwise_samples": 10, "ema": 0.9}


def prepare(folder: Path, student: dict[str, Tensor], dense: dict[str, Tensor], **sections: Any) -> list[str]:
    """A folder with all that a run needs and the converted student; the command's arguments."""
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, folder / "teacher.safetensors")
    write_latents(folder)
    (folder / "out" / "convert").mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in student.items()}, folder / "out" / "convert" / "student.safetensors")
    defaults: dict[str, Any] = {
        "stages": [*STAGES, "export"],
        "training": TRAINING,
        "data": {"held_out": 0},  # what is learnt of random latents says nothing on others
        "stage": {stage: {"steps": STEPS, "learning_rate": rate} for stage, rate in RATES.items()},
        "checkpoints": {"every": 2},
        "export": {"dtype": "float32"},
        "resume": "latest",
    }
    return ["distill", str(run_file(folder, **{**defaults, **sections}))]


def grouped() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(student, teacher) with two groups, compressed modulations that lose something, and expert means."""
    dense, compressed = files.compressible(files.dense_flux(DIMS), 11, DIMS)
    generator = torch.Generator().manual_seed(5)
    for name, weight in compressed.items():
        if name != "adaln_in.weight":
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return files.split(dense, DIMS, mean=True, compressed=compressed, groups=GROUPS), dense


def arguments(room: Path, out: Path, *overrides: str) -> list[str]:
    return ["distill", str(room / "run-file.yaml"), f"output_dir={out}", *overrides]


def weights(out: Path, stage: str) -> dict[str, Tensor]:
    return load_file(out / stage / "student.safetensors")


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if name != "d2m_config" and not torch.equal(before[name], after[name])}


def log(out: Path, stage: str) -> list[dict[str, Any]]:
    return read_stage_log(out / stage / "log.jsonl")


def steps(out: Path, stage: str) -> list[dict[str, Any]]:
    return [line for line in log(out, stage) if "loss/total" in line]


def errors(out: Path, stage: str) -> dict[str, tuple[float, float]]:
    """Return the error of every part before and after its training, with other noise than it is trained with."""

    def measured(name: str) -> dict[str, float]:
        lines = [line for line in log(out, stage) if name in line]
        found = {line["block"]: line[name] for line in lines}
        assert len(found) == len(lines), "once each"
        return found

    before, after = measured("validation/block_error_before"), measured("validation/block_error")
    return {name: (before[name], after[name]) for name in before}

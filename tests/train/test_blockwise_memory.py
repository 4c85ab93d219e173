"""Memory of blockwise mode, measured and as the plan estimates it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d2m_model.config import FFNLayout
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
from d2m_train.blockwise.part import Part
from d2m_train.distillation.stages import plan_stage, prepare_student
from d2m_train.plan.estimate import plan_run
from d2m_train.run_config import StageSection
from d2m_train.run_file import load_run
from tests.toys import files
from tests.toys.blockwise_runs import DIMS, STEPS, TRAINING, grouped, prepare
from tests.toys.runs import ROOT, environment


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, data, the run's file, and the converted student in `out`."""
    folder = tmp_path_factory.mktemp("blockwise")
    prepare(folder, *grouped())
    return folder


def test_the_plan_counts_the_largest_part(room: Path) -> None:
    run = load_run(room / "run-file.yaml")
    core = FluxMoETransformer2DModel.from_flux_moe(room / "out" / "convert" / "student.safetensors")
    plan = plan_run(run)
    planned: dict[str, Any] = {stage.stage: stage for stage in plan.stages}
    assert core.adaln_in is not None
    for stage, part in (
        ("shared", Part(name="", kind="double", blocks=(1,), start=1, end=2, group=None)),
        ("blocks", Part(name="", kind="double", blocks=(1, 2), start=1, end=3, group=0)),
    ):
        chosen = plan_stage(stage, core.flux_moe, StageSection())  # type: ignore[arg-type]
        prepare_student(core, chosen)
        own = [p for name, p in core.named_parameters() if part.has(name)]
        trained = [p for p in own if p.requires_grad]
        memory = planned[stage].memory
        assert memory["student's weights"] == sum(p.nbytes for p in (*own, core.adaln_in.weight))
        assert memory["gradients"] == memory["average"] == sum(p.nbytes for p in trained)
        assert memory["optimizer"] == sum(2 * p.nbytes + 4 for p in trained)
        assert planned[stage].steps == STEPS
    assert planned["shared"].samples == 7 * STEPS * run.training.batch_size
    entry = 2 * (16 + 6) * 128 * 4  # samples, tokens, channels, bytes
    assert plan.disk["teacher's features"] == (2 * (5 + 1) + 1) * entry


MEASURE = """
import gc, json, sys
from d2m_train.__main__ import main

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

small, large = sys.argv[1:]
assert main(["distill", small]) == 0  # what a first run loads of the libraries
gc.freeze()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM counts from here
before = status("VmRSS")
assert main(["distill", large]) == 0
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_memory_is_that_of_a_block_and_its_optimizer(tmp_path: Path) -> None:
    dims = replace(DIMS, hidden_size=512, double_blocks=1, single_blocks=16)
    runs, parameters = [], 0
    for name, size, layout in (
        ("small", replace(DIMS, double_blocks=1, single_blocks=1), files.LAYOUT),
        ("large", dims, FFNLayout(shared=512, experts=12, width=128)),
    ):
        dense = files.dense_flux(size)
        student = files.split(dense, size, layout)
        parameters = sum(tensor.numel() for tensor in dense.values())
        (tmp_path / name).mkdir()
        runs += prepare(
            tmp_path / name,
            {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in student.items()},
            {key: tensor.bfloat16() for key, tensor in dense.items()},
            teacher={"dtype": "bfloat16"},
            stages=["shared"],
            stage={"shared": {"steps": 1, "trainable": ["transformer_blocks.*", "single_transformer_blocks.*"]}},
            training={**TRAINING, "ema": None},
        )[1:]
        del dense, student
    # What is freed goes back at once, as it does by itself with blocks of a real FLUX's size.
    again = environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE, *runs], cwd=ROOT, env=again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    most = json.loads(done.stdout.splitlines()[-1])
    block = 4 * 36 * 512**2 / 2**20  # MiB of a double block in float32; weights, gradients and AdamW's state are four
    assert 4 * parameters / 2**20 > 7 * block, "the student's weights alone"
    assert 3 * block < most < 6 * block

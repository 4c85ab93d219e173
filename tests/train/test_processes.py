"""Two processes on a CPU (gloo) train as one does: DDP, FSDP2 and DeepSpeed's ZeRO, from accelerate's own settings."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2m_model.config import FFNLayout
from d2m_train.__main__ import main
from d2m_train.monitor.stage_log import read_stage_log
from tests.toys import files
from tests.toys.blockwise_runs import DIMS, prepare
from tests.toys.runs import DDP, FLAT, FSDP2, distill, run_file, torchrun, wait_for_step, write_inputs, zero

STAGES = ("shared", "experts", "blocks")
STEPS = 2
SHORT = {stage: {"steps": STEPS, "learning_rate": 1e-3} for stage in STAGES}
CHECKPOINTS = {"every": 9}  # but for the one that each stage ends with


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs for preset L, of fewer blocks."""
    folder = tmp_path_factory.mktemp("flat")
    write_inputs(folder, FLAT)
    return folder


def losses(out: Path, stage: str) -> list[dict[str, float]]:
    return [line for line in read_stage_log(out / stage / "log.jsonl") if "loss/total" in line]


def run(
    inputs: Path, name: str, *overrides: str, ranks: int = 1, env: dict[str, str] | None = None, **sections: Any
) -> Path:
    """A run in a folder of its own, with what it said in said.txt. The conversion is one for all, unless a run asks for
    its own."""
    out = inputs / name
    if not any(override.startswith("convert.") for override in overrides):
        shutil.copytree(converted(inputs, sections.get("student", {})), out / "convert")
    file = run_file(inputs, stage=SHORT, checkpoints=CHECKPOINTS, **sections)
    said = distill(file, f"output_dir={out}", *overrides, ranks=ranks, env=env).succeed()
    (out / "said.txt").write_text(said)
    return out


def converted(inputs: Path, student: dict[str, Any]) -> Path:
    out = inputs / "-".join(["converted", *map(str, student.values())])
    if not out.exists():
        file = run_file(inputs, student=student)
        assert main(["distill", str(file), f"output_dir={out}", "stages=[convert]"]) == 0
    return out / "convert"


BALANCED = ("losses.balance=1", "losses.block_balance=1")  # so that both count


@pytest.fixture(scope="module")
def one_process(inputs: Path) -> Path:
    """The global batch of two processes in two microbatches of one."""
    return run(inputs, "one", "training.accumulation=2", *BALANCED, student={"preset": "S"})


# Among the packages for development it is on Linux alone.
DEEPSPEED = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")


@pytest.mark.parametrize(
    ("name", "env", "stages"),
    [
        ("ddp", DDP, STAGES),
        ("fsdp2", FSDP2, STAGES),
        pytest.param("zero2", zero(2), STAGES, marks=DEEPSPEED),
        pytest.param("zero3", zero(3), ("blocks",), marks=DEEPSPEED),  # `experts` in the last test
    ],
)
def test_two_processes_give_the_losses_and_weights_of_one(
    inputs: Path, one_process: Path, name: str, env: dict[str, str], stages: tuple[str, ...]
) -> None:
    """Those stages; what comes before them is the one process's."""
    for stage in set(STAGES) - set(stages):
        shutil.copytree(one_process / stage, inputs / name / stage)
    asked = f"stages=[{', '.join(('convert', *stages))}]"
    two = run(inputs, name, *BALANCED, asked, student={"preset": "S"}, ranks=2, env=env)
    for stage in stages:
        alone, together = losses(one_process, stage), losses(two, stage)
        assert len(alone) == len(together) == STEPS
        for a, b in zip(alone, together, strict=True):
            for part in ("loss/total", "loss/output", "loss/features", "grad_norm"):
                assert b[part] == pytest.approx(a[part], rel=1e-4), (stage, a["step"], part)
        a_student = load_file(one_process / stage / "student.safetensors")
        b_student = load_file(two / stage / "student.safetensors")
        for tensor, value in a_student.items():
            if value.is_floating_point():
                assert (b_student[tensor] - value).norm() <= 1e-4 * value.norm().clamp_min(1e-6), (stage, tensor)


BF16 = ("training.mixed_precision=bf16", "student.frozen_dtype=bfloat16")


def test_a_sharded_run_in_mixed_precision_with_averages_goes_on_from_what_it_trained(flat: Path) -> None:
    """bf16 by autocast, frozen weights in bf16, and averages that validation puts in place: what is frozen stays the
    file's own bits, and what is trained goes on from the trained weights, not from their averages."""
    options = (*BF16, "eyes.validate_every=1", "stages=[convert, shared, experts]")
    plain = run(flat, "bf16", *options, ranks=2, env=FSDP2)
    averaged = run(flat, "bf16-ema", *options, "training.ema=0.5", ranks=2, env=FSDP2)
    # Where a run stands does not depend on averages; the next stage begins with them.
    for a, b in zip(losses(plain, "shared"), losses(averaged, "shared"), strict=True):
        assert b["loss/total"] == pytest.approx(a["loss/total"], rel=1e-5)
    assert len(losses(averaged, "experts")) == STEPS
    before, after = (load_file(plain / stage / "student.safetensors") for stage in ("shared", "experts"))
    up = "double_blocks.1.img_mlp.0.weight"
    assert not torch.equal(before[up], before[up].bfloat16().float()), "trained in float32"
    assert torch.equal(before[up][:128], after[up][:128])
    assert not torch.equal(before[up][128:], after[up][128:])


def test_block_routers_that_disagree_between_ranks_do_not_stall_a_sharded_run(inputs: Path) -> None:
    """Batches of one sample, so that a block that half of the samples chose was chosen on one of the two ranks; in mixed
    precision, with averages."""
    options = ("training.batch_size=1", "convert.block_router=random", "eyes.routers_every=1", *BF16)
    options = (*options, "training.ema=0.5", "stage.shared.steps=0", "stage.experts.steps=0")
    out = run(inputs, "disagree", *options, student={"preset": "S"}, ranks=2, env=FSDP2)
    chosen = [
        value
        for line in read_stage_log(out / "blocks" / "log.jsonl")
        for name, value in line.items()
        if name.startswith("router/block_groups.") and "/block_" in name
    ]
    assert 0.5 in chosen, "nowhere did the ranks disagree"
    assert len(losses(out, "blocks")) == STEPS


def test_capacity_routing_of_two_processes_is_that_of_one_with_the_same_microbatch_pools(flat: Path) -> None:
    student = {"preset": "L", "router": "capacity"}
    options = ("stages=[convert, shared, experts]", "stage.shared.steps=0")
    one = run(flat, "capacity-one", "training.accumulation=2", *options, student=student)
    two = run(flat, "capacity-two", *options, student=student, ranks=2, env=DDP)
    for a, b in zip(losses(one, "experts"), losses(two, "experts"), strict=True):
        assert b["loss/total"] == pytest.approx(a["loss/total"], rel=1e-4)
        assert b["loss/predictor"] == pytest.approx(a["loss/predictor"], rel=1e-4)
    ones, twos = (load_file(out / "experts" / "student.safetensors") for out in (one, two))
    thresholds = [name for name in ones if name.endswith(".threshold")]
    assert thresholds
    start = load_file(one / "convert" / "student.safetensors")
    for name in thresholds:
        assert not torch.equal(ones[name], start[name]), "a running mean of what was routed"
        assert (ones[name] - twos[name]).abs().max() <= 1e-3 * (ones[name] - start[name]).abs().max()


@pytest.fixture(scope="module")
def sharded(flat: Path) -> Path:
    """A whole run of stage `shared` in two processes, a checkpoint at every step."""
    return run(flat, "sharded", *EVERY_STEP, ranks=2, env=FSDP2)


LONGER = 5
EVERY_STEP = ("stages=[convert, shared]", f"stage.shared.steps={LONGER}", "checkpoints.every=1", "checkpoints.keep=9")


def test_fsdp2_shards_and_says_so(sharded: Path) -> None:
    """A parameter's elements on one rank are half of it, so what is compared with one process is not DDP once more."""
    assert "2 processes, fsdp2: each holds 50% of the student's weights" in (sharded / "said.txt").read_text()


def test_a_sharded_run_goes_on_in_one_process(flat: Path, sharded: Path) -> None:
    """Checkpoints are portable: two processes begin, one ends, at the global batch that it gathers by accumulation."""
    out = flat / "portable"
    shutil.copytree(sharded, out)
    (out / "shared" / "student.safetensors").unlink()
    for step in range(2, LONGER + 1):
        shutil.rmtree(out / "shared" / "checkpoints" / f"step-{step:06}")
    options = (f"output_dir={out}", *EVERY_STEP, "resume=latest", "training.accumulation=2")
    said = distill(run_file(flat, stage=SHORT), *options).succeed()
    assert "going on at step-000001" in said
    for name, value in load_file(sharded / "shared" / "student.safetensors").items():
        if value.is_floating_point():
            found = load_file(out / "shared" / "student.safetensors")[name]
            assert (found - value).norm() <= 1e-4 * value.norm().clamp_min(1e-6), name


def test_experts_that_two_ranks_do_not_share_evenly_are_sharded_along_their_width(inputs: Path) -> None:
    """Three experts: each rank has half of every one. A checkpoint of one process goes on so, and ends where that one does."""
    dense = files.dense_flux(DIMS)
    student = files.split(dense, DIMS, FFNLayout(shared=128, experts=3, width=128))
    folder = inputs / "uneven"
    folder.mkdir()
    stages = {"shared": {"steps": 0}, "experts": {"steps": 2, "learning_rate": 1e-3}}
    _, file = prepare(folder, student, dense, stages=["experts"], stage=stages, training={"batch_size": 2})
    alone = distill(Path(file), "training.accumulation=2", "checkpoints.every=1")
    alone.succeed()
    shutil.copytree(folder / "out", folder / "two")
    (folder / "two" / "experts" / "student.safetensors").unlink()
    shutil.rmtree(folder / "two" / "experts" / "checkpoints" / "step-000002")
    said = distill(Path(file), f"output_dir={folder / 'two'}", "checkpoints.every=1", ranks=2, env=FSDP2).succeed()
    assert "each holds 50% of the student's weights" in said
    assert "going on at step-000001" in said
    one, two = (load_file(folder / name / "experts" / "student.safetensors") for name in ("out", "two"))
    for name, value in one.items():
        if value.is_floating_point():
            assert (two[name] - value).norm() <= 1e-5 * value.norm().clamp_min(1e-6), name


def test_sigterm_stops_both_ranks_with_a_checkpoint_and_they_go_on_bit_for_bit(flat: Path, sharded: Path) -> None:
    """torchrun passes the signal on and then fails itself."""
    out = flat / "stopped"
    shutil.copytree(sharded / "convert", out / "convert")
    file = run_file(flat, stage=SHORT)
    asked = ["distill", str(file), f"output_dir={out}", *EVERY_STEP, "resume=latest"]
    process = torchrun([*asked, "checkpoints.every=1000"], FSDP2)
    wait_for_step(process, out, "shared", 1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode != 0
    (saved,) = (out / "shared" / "checkpoints").iterdir()
    reached = int(saved.name.removeprefix("step-"))
    assert 1 <= reached < LONGER, said
    stops = [line["step"] for line in read_stage_log(out / "shared" / "log.jsonl") if line.get("event") == "stopped"]
    assert stops == [reached], "one of the two says it"
    assert f"going on at {saved.name}" in distill(file, *asked[2:], ranks=2, env=FSDP2).succeed()
    found = load_file(out / "shared" / "student.safetensors")
    for name, value in load_file(sharded / "shared" / "student.safetensors").items():
        assert torch.equal(found[name], value), name


@DEEPSPEED
def test_a_run_under_deepspeed_goes_on_bit_for_bit_and_under_any_other_strategy(flat: Path) -> None:
    """Stage 3, where weights, averages and optimizer state lie in parts, with validation in between, which leaves weights
    whole that are no longer the trained ones. Checkpoints are like any other's: one process reads them, and stage 2."""
    student = {"preset": "L", "router": "capacity"}
    common = ("stages=[convert, shared, experts]", "stage.shared.steps=0", "training.ema=0.5", "eyes.validate_every=1")
    common = (*common, "checkpoints.every=1", "checkpoints.keep=9", "training.gradient_checkpointing=true")
    whole = run(flat, "zero-whole", *common, student=student, ranks=2, env=zero(3))
    assert "2 processes, zero3: each holds 50% of the student's weights" in (whole / "said.txt").read_text()

    def go_on(name: str, *overrides: str, ranks: int, env: dict[str, str] | None) -> dict[str, torch.Tensor]:
        out = flat / name
        shutil.copytree(whole, out)
        (out / "experts" / "student.safetensors").unlink()
        shutil.rmtree(out / "experts" / "checkpoints" / "step-000002")
        file = run_file(flat, stage=SHORT, student=student)
        options = (f"output_dir={out}", *common, "resume=latest", *overrides)
        assert "going on at step-000001" in distill(file, *options, ranks=ranks, env=env).succeed()
        return load_file(out / "experts" / "student.safetensors")

    again = go_on("zero-again", ranks=2, env=zero(3))
    two = go_on("zero-two", ranks=2, env=zero(2))
    one = go_on("zero-one", "training.accumulation=2", ranks=1, env=None)
    for name, value in load_file(whole / "experts" / "student.safetensors").items():
        assert torch.equal(again[name], value), name
        if value.is_floating_point():
            for found in (two[name], one[name]):
                assert (found - value).norm() <= 1e-5 * value.norm().clamp_min(1e-6), name

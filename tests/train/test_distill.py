"""A whole distillation as a user runs it: stages, files, stopping and going on, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2m_model.checkpoint import check_file
from d2m_train.__main__ import main
from d2m_train.monitor.stage_log import read_stage_log
from tests.toys.runs import (
    FLAT,
    environment,
    run_file,
    steps_logged,
    wait_for_step,
    write_inputs,
)
from tests.toys.trainer_process import ROOT, Run

STAGES = ("shared", "experts", "blocks")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs for preset L, of fewer blocks."""
    folder = tmp_path_factory.mktemp("flat")
    write_inputs(folder, FLAT)
    return folder


@pytest.fixture(scope="session")
def finished(inputs: Path) -> Path:
    """The output_dir of a run of preset S that nothing has stopped, by the command as a user gives it."""
    command = [sys.executable, "-m", "d2m_train", "distill", str(run_file(inputs, student={"preset": "S"}))]
    done = subprocess.run([*command, "training.ema=0.9"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (inputs / "said.txt").write_text(done.stdout + done.stderr)
    return inputs / "out"


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments that go on with a copy of the finished run's folder, of which some stages are taken away."""

    def copy(*without: str) -> list[str]:
        out = tmp_path / "out"
        shutil.copytree(finished, out)
        for stage in without:
            shutil.rmtree(out / stage)
        return [*arguments(finished), f"output_dir={out}"]

    return copy


def arguments(finished: Path) -> list[str]:
    file = str(finished.parent / "run-file.yaml")
    return ["distill", file, "student.preset=S", "training.ema=0.9", "resume=latest"]


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "student.safetensors")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if name != "d2m_config" and not torch.equal(before[name], after[name])}


def error_of(result: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert result == 2
    return capsys.readouterr().err


# Stages


def test_a_run_ends_with_a_file_that_routes_as_it_was_trained(finished: Path) -> None:
    config = check_file(finished / "student.safetensors")
    assert (config.gate.mode, config.gate.scale, config.split_only) == ("normalised", 2.0, False)
    assert len(config.groups) == 2
    assert load_file(finished / "student.safetensors")["img_in.weight"].dtype == torch.bfloat16


def test_stage_shared_trains_shared_experts_and_modulations_alone(finished: Path) -> None:
    before, after = weights(finished, "convert"), weights(finished, "shared")
    moved = changed(before, after)
    allowed = (
        "*_mlp.0.*",
        "*_mlp.2.*",
        "single_blocks.*.linear?.*",
        "*_mod.lin.*",
        "*.modulation.lin.*",
        "adaln_in.weight",
    )
    assert moved
    assert not [name for name in moved if not any(fnmatch(name, pattern) for pattern in allowed)]
    for name, shared in (
        ("double_blocks.1.img_mlp.0.weight", slice(0, 128)),
        ("single_blocks.2.linear1.weight", slice(384, 512)),
    ):
        differs = (before[name] != after[name]).any(1)
        assert differs[shared].all(), name
        assert not differs[shared.stop :].any(), "routed experts are off"
        assert not differs[: shared.start].any(), "attention"
    assert not changed(
        {name: t for name, t in before.items() if name.startswith("double_blocks.0.") and "_mod." not in name}, after
    ), "a dense block"


def test_stage_experts_leaves_the_shared_experts_bit_for_bit(finished: Path) -> None:
    before, after = weights(finished, "shared"), weights(finished, "experts")
    moved = changed(before, after)
    assert {"double_blocks.2.txt_mlp.router.weight", "single_blocks.5.expert_mean"} <= moved
    up, down = "double_blocks.1.img_mlp.0.weight", "double_blocks.1.img_mlp.2.weight"
    assert torch.equal(before[up][:128], after[up][:128])
    assert (before[up][128:] != after[up][128:]).any()
    assert torch.equal(before[down][:, :128], after[down][:, :128])
    assert not [
        name for name in moved if "_mod." in name or "modulation" in name or "attn" in name or "block_groups" in name
    ]


def test_stage_blocks_leaves_isolated_blocks_bit_for_bit(finished: Path) -> None:
    before, after = weights(finished, "experts"), weights(finished, "blocks")
    groups = check_file(finished / "blocks" / "student.safetensors").groups
    inside = tuple(
        f"{group.kind}_blocks.{index}." for group in groups for index in range(group.first, group.first + group.blocks)
    )
    moved = changed(before, after)
    assert {name for name in moved if not name.startswith((*inside, "block_groups."))} == set()
    assert {"block_groups.0.router_x.weight", "block_groups.1.router_y.weight"} <= moved
    assert [name for name in moved if name.endswith("img_attn.qkv.weight")], "what a group trains is whole blocks"


def test_every_step_is_logged_with_its_losses_and_what_the_routers_did(finished: Path) -> None:
    lines = read_stage_log(finished / "experts" / "log.jsonl")
    steps = [line for line in lines if "loss/total" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"loss/output", "loss/features", "loss/balance", "learning_rate", "tokens_per_second"} <= steps[0].keys()
    validated = [line for line in lines if "validation/loss" in line]
    assert [line["step"] for line in validated] == [0, 4], "before the first step, too"
    before, after = (f"{line['validation/loss']:.3g}" for line in validated)
    said = (finished.parent / "said.txt").read_text()
    assert f"experts, step 0: validation {before}\n" in said
    assert f"experts, step 4: validation {before} → {after}\n" in said


def test_a_run_says_what_it_begins_with_and_how_it_ended(finished: Path) -> None:
    said = (finished.parent / "said.txt").read_text()
    assert re.search(r"^1 process, on the CPU \(\d+ threads each\)\.$", said, re.MULTILINE)
    assert "latents.safetensors: 24 samples, 1 of them held out for validation.\n" in said
    expected = "Global batch: 2 × 1 accumulated × 1 process = 2 samples. Steps: shared 4, experts 4, blocks 4."
    assert expected in said
    assert re.search(
        r"^Done in .*\d s\. Peak memory of the main process: \d+\.\d\d GiB of the host\.$", said, re.MULTILINE
    )
    file, teacher = finished / "student.safetensors", finished.parent / "teacher.safetensors"
    assert f"Next: python -m d2m_train evaluate {file} --teacher {teacher} --data PROMPTS.txt\n" in said
    blocks = [line for line in read_stage_log(finished / "blocks" / "log.jsonl") if "loss/total" in line]
    assert "loss/block_balance" in blocks[0]
    assert list((finished / "tensorboard" / "shared").iterdir())


def test_a_stage_alone_begins_with_the_file_of_the_one_before(begun: Callable[..., list[str]], finished: Path) -> None:
    again = begun("experts", "blocks")
    out = Path(again[-1].removeprefix("output_dir="))
    assert main([*again, "stages=[experts]"]) == 0
    assert not changed(weights(finished, "experts"), weights(out, "experts"))
    assert not (out / "blocks").exists()


def test_a_stage_without_the_one_before_says_so(
    begun: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    again = begun("experts", "blocks")
    assert "Run stage experts first" in error_of(main([*again, "stages=[blocks]"]), capsys)
    assert main([*again, "stages=[blocks]", "stage.experts.steps=0", "stage.blocks.steps=1"]) == 0


def test_restart_makes_a_stage_and_those_behind_it_anew(begun: Callable[..., list[str]], finished: Path) -> None:
    again = begun()
    out = Path(again[-1].removeprefix("output_dir="))
    kept = (out / "shared" / "student.safetensors").stat().st_mtime_ns
    assert main([*again, "restart=experts", "stage.experts.steps=2", "stages=[experts]"]) == 0
    assert steps_logged(out, "experts") == [1, 2]
    assert (out / "shared" / "student.safetensors").stat().st_mtime_ns == kept
    assert not (out / "blocks").exists()


# Stopping and going on


def test_a_run_killed_in_any_stage_ends_bit_for_bit_where_the_other_ends(
    begun: Callable[..., list[str]], finished: Path
) -> None:
    again = begun(*STAGES)
    out = Path(again[-1].removeprefix("output_dir="))
    for stage, step in (("shared", 3), ("experts", 1), ("blocks", 3)):
        process = Run(again)
        wait_for_step(process, out, stage, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
    Run(again).wait().succeed()
    for stage in STAGES:
        assert not changed(weights(finished, stage), weights(out, stage)), stage
        assert steps_logged(out, stage) == [1, 2, 3, 4]
    resumed = [line for line in read_stage_log(out / "shared" / "log.jsonl") if line.get("event") == "resumed"]
    assert [line["step"] for line in resumed] == [2], "at its last checkpoint, one interval repeated at most"


def test_sigterm_saves_and_exits_and_the_run_goes_on_there(begun: Callable[..., list[str]], finished: Path) -> None:
    again = begun(*STAGES)
    out = Path(again[-1].removeprefix("output_dir="))
    process = Run([*again, "checkpoints.every=1000"])
    wait_for_step(process, out, "shared", 1)
    process.send_signal(signal.SIGTERM)
    result = process.wait()
    assert result.returncode == 143, result.output
    (saved,) = (out / "shared" / "checkpoints").iterdir()
    reached = int(saved.name.removeprefix("step-"))
    assert 1 <= reached < 4
    assert [
        line["step"] for line in read_stage_log(out / "shared" / "log.jsonl") if line.get("event") == "stopped"
    ] == [reached]
    assert main([*again, "stages=[shared]"]) == 0
    assert not changed(weights(finished, "shared"), weights(out, "shared"))


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(
    begun: Callable[..., list[str]], finished: Path
) -> None:
    again = begun("experts", "blocks")
    out = Path(again[-1].removeprefix("output_dir="))
    (out / "shared" / "student.safetensors").unlink()
    shutil.rmtree(out / "shared" / "checkpoints" / "step-000004")
    good = out / "shared" / "checkpoints" / "step-000002"
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    limit = 100_000  # bytes of a file: more than a log, less than a checkpoint
    result = Run([*again, "stages=[shared]"], largest_file=limit).wait()
    assert result.returncode == 2, result.output[-3000:]
    assert "cannot be written (File too large)" in result.output
    assert f"last good one is {good}" in result.output
    assert [path.name for path in (out / "shared" / "checkpoints").iterdir()] == [good.name]
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before
    assert main([*again, "stages=[shared]"]) == 0
    assert not changed(weights(finished, "shared"), weights(out, "shared"))


def test_only_the_newest_checkpoints_are_kept(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "shared" / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


# What goes wrong


def test_another_run_does_not_go_on_in_this_folder(
    begun: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    again = begun("experts", "blocks")
    said = error_of(main([*again, "student.preset=M"]), capsys)
    assert "student.preset was 'S', is 'M'" in said
    assert "resume=latest" in error_of(main([*again, "resume=never"]), capsys)


def test_more_steps_and_another_learning_rate_go_on_when_asked(
    begun: Callable[..., list[str]], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("stage.shared.steps=6", "stage.experts.steps=0", "stage.shared.learning_rate=5e-4")
    again = [*begun("blocks"), *steps, "stages=[shared]"]
    out = Path(again[-5].removeprefix("output_dir="))
    assert "may change with resume=changed" in error_of(main(again), capsys)
    assert "add restart=experts" in error_of(main([*again, "resume=changed"]), capsys)
    assert main([*again, "resume=changed", "stages=[shared,experts]", "restart=experts"]) == 0
    said = capsys.readouterr().out
    assert (
        "shared: 6 steps instead of 4, learning rate 0.0005 instead of 0.001. The cosine schedule is now that" in said
    )
    assert steps_logged(out, "shared") == [1, 2, 3, 4, 5, 6]
    assert changed(weights(finished, "shared"), weights(out, "shared"))
    assert main([*again, "resume=latest"]) == 0
    assert "expected 6 or more" in error_of(main([*again, "resume=changed", "stage.shared.steps=5"]), capsys)


def test_another_teacher_is_refused_on_resume(
    begun: Callable[..., list[str]], inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = begun("experts", "blocks")
    out = Path(again[-1].removeprefix("output_dir="))
    (out / "shared" / "student.safetensors").unlink()
    other = load_file(inputs / "teacher.safetensors")
    other["img_in.weight"] += 1
    from safetensors.torch import save_file

    save_file(other, tmp_path / "other.safetensors")
    said = error_of(main([*again, f"teacher.path={tmp_path / 'other.safetensors'}"]), capsys)
    assert "teacher.fingerprint" in said
    # Moved elsewhere it is the same.
    shutil.copyfile(inputs / "teacher.safetensors", tmp_path / "moved.safetensors")
    assert main([*again, f"teacher.path={tmp_path / 'moved.safetensors'}", "stages=[shared]"]) == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_can_be_taken(
    begun: Callable[..., list[str]], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = begun("experts", "blocks")
    out = Path(again[-1].removeprefix("output_dir="))
    (out / "shared" / "student.safetensors").unlink()
    damaged = out / "shared" / "checkpoints" / "step-000004"
    (shard,) = damaged.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    said = error_of(main([*again, "stages=[shared]"]), capsys)
    assert str(damaged) in said
    assert "delete step-000004" in said
    shutil.rmtree(damaged)
    assert main([*again, "stages=[shared]"]) == 0
    assert not changed(weights(finished, "shared"), weights(out, "shared"))


def test_a_missing_teacher_and_wrong_names_are_errors_of_one_line(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(run_file(tmp_path, teacher={"path": str(tmp_path / "none.safetensors")}))
    assert "none.safetensors" in error_of(main(["distill", file]), capsys)
    assert "did you mean training.batch_size?\n" in error_of(main(["distill", file, "training.batchsize=3"]), capsys)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_module(
    begun: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    again = begun(*STAGES)
    out = Path(again[-1].removeprefix("output_dir="))
    said = error_of(main([*again, "stage.shared.learning_rate=1.0e+37", "stages=[shared]"]), capsys)
    assert "Stage shared, step 2" in said or "Stage shared, step 3" in said
    assert "blocks." in said
    assert not (out / "shared" / "student.safetensors").exists()


# Other students


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"student": {"preset": "L", "router": "capacity"}}, id="capacity"),
        pytest.param({"student": {"preset": "L", "baseline": "mlp_pruning"}}, id="mlp pruning"),
        pytest.param({"student": {"preset": "S", "baseline": "depth_pruning"}}, id="depth pruning"),
        pytest.param(
            {"training": {"accumulation": 2, "gradient_checkpointing": True, "schedule": "linear"}}, id="accumulation"
        ),
        pytest.param({"timesteps": {"sampling": "teacher_grid", "grid_steps": 4}}, id="few-step teacher"),
    ],
)
def test_other_students_and_ways_to_train_run_from_teacher_to_file(
    inputs: Path, flat: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = inputs if options.get("student", {}).get("preset") == "S" else flat
    for name in ("teacher", "latents"):
        os.symlink(source / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    stages = {stage: {"steps": 2, "learning_rate": 1e-3} for stage in STAGES}
    assert main(["distill", str(run_file(tmp_path, stage=stages, **options))]) == 0
    config = check_file(tmp_path / "out" / "student.safetensors")
    pruned = options.get("student", {}).get("baseline") == "mlp_pruning"
    assert config.gate.mode == ("sum" if pruned else "normalised")
    last = "blocks" if options.get("student", {}).get("preset") == "S" else "shared" if pruned else "experts"
    losses = [
        json.loads(line)["loss/total"]
        for line in (tmp_path / "out" / last / "log.jsonl").read_text().splitlines()
        if "loss/total" in line
    ]
    assert len(losses) == 2


def test_a_student_is_exported_in_other_precisions_and_for_diffusers(finished: Path, tmp_path: Path) -> None:
    source = finished / "experts" / "student.safetensors"
    half, folder = tmp_path / "half.safetensors", tmp_path / "diffusers"
    assert main(["export", str(source), "--out", str(half), "--dtype", "float16"]) == 0
    before, after = load_file(source), load_file(half)
    assert after["img_in.weight"].dtype == torch.float16
    assert torch.equal(after["single_blocks.0.linear1.weight"], before["single_blocks.0.linear1.weight"].half())
    assert torch.equal(after["single_blocks.0.router.weight"], before["single_blocks.0.router.weight"]), "as it was"
    assert main(["export", str(source), "--out", str(folder), "--dtype", "float32", "--diffusers"]) == 0
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

    read = FluxMoETransformer2DModel.from_pretrained(folder)
    written = FluxMoETransformer2DModel.from_flux_moe(source)
    states = read.state_dict(), written.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

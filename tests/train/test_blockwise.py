"""Blockwise mode: parts of a student one after the other against the teacher's features on the disk."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model.checkpoint import check_file
from d2m_model.config import FluxMoEConfig
from d2m_model.conversion.depth_pruning import ShallowTeacher, TeacherBlocks, output_blocks
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
from d2m_model.routers import CapacityRouter
from d2m_model.teacher import open_teacher
from d2m_model.tensor_writer import TensorWriter
from d2m_train import UserError
from d2m_train.__main__ import main
from d2m_train.blockwise.feature_store import Features
from d2m_train.blockwise.part import Part, PartBlocks, relative_losses
from d2m_train.blockwise.stage import check_blockwise, split_into_parts
from d2m_train.data.store import Store
from d2m_train.distillation.stages import plan_stage, trainable_names
from d2m_train.monitor.stage_log import StageLog
from d2m_train.run_config import StageSection
from d2m_train.run_file import load_run
from tests.toys import files
from tests.toys.blockwise_runs import (
    DIMS,
    GROUPS,
    SINGLES,
    STAGES,
    STEPS,
    arguments,
    changed,
    errors,
    grouped,
    log,
    prepare,
    steps,
    weights,
)
from tests.toys.trainer_process import Run


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage() -> Iterator[None]:
    """Each part ends with a garbage collection, which need not look at everything that pytest holds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, data, the run's file, and the converted student in `out`."""
    folder = tmp_path_factory.mktemp("blockwise")
    prepare(folder, *grouped())
    return folder


@pytest.fixture(scope="module")
def finished(room: Path) -> Path:
    """The output_dir of a run that nothing has stopped."""
    out = room / "finished"
    shutil.copytree(room / "out", out)
    assert main(arguments(room, out)) == 0
    return out


@pytest.fixture
def begun(room: Path, finished: Path, tmp_path: Path) -> Path:
    """An output_dir in which the stages ahead of `blocks` have been run."""
    out = tmp_path / "out"
    for stage in ("convert", "shared", "experts"):
        (out / stage).mkdir(parents=True)
        os.link(finished / stage / "student.safetensors", out / stage / "student.safetensors")
    return out


# What is trained


def parts(stage: str, config: FluxMoEConfig, teacher_doubles: int = 3) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        core = FluxMoETransformer2DModel(config)
    plan = plan_stage(stage, config, StageSection())  # type: ignore[arg-type]
    found = split_into_parts(config, plan, trainable_names(core, plan), teacher_doubles)
    return {part.name: (part.start, part.end) for part in found}


def test_stages_train_block_by_block_and_groups_whole(room: Path) -> None:
    config = check_file(room / "out" / "convert" / "student.safetensors")
    assert parts("shared", config) == {
        **{f"double_blocks.{index}": (index, index + 1) for index in range(3)},
        **{name: (index + 3, index + 4) for index, name in enumerate(SINGLES)},
    }
    assert "double_blocks.0" not in parts("experts", config), "which is dense"
    assert parts("blocks", config) == {"block_groups.0": (1, 3), "block_groups.1": (4, 6)}


def test_every_part_comes_nearer_to_its_teacher(finished: Path) -> None:
    for stage in STAGES:
        found = errors(finished, stage)
        assert len(found) == {"shared": 7, "experts": 6, "blocks": 2}[stage]
        for name, (before, after) in found.items():
            assert after < before, (stage, name)


def test_nothing_but_what_the_stage_trains_has_changed(finished: Path) -> None:
    convert, shared, experts, blocks = (weights(finished, stage) for stage in ("convert", *STAGES))
    moved = changed(convert, shared)
    allowed = ("*_mlp.[02].*", "single_blocks.*.linear?.*", "*_mod.lin.*", "*.modulation.lin.*")
    assert not [name for name in moved if not any(fnmatch(name, pattern) for pattern in allowed)]
    up, linear1, linear2 = (
        f"{name}.weight" for name in ("double_blocks.1.img_mlp.0", "single_blocks.2.linear1", "single_blocks.2.linear2")
    )
    assert (convert[linear1] != shared[linear1]).any(1).tolist() == [384 <= row < 512 for row in range(896)]
    assert (convert[linear2] != shared[linear2]).any(0).tolist() == [128 <= column < 256 for column in range(640)]
    assert not any(name.startswith("double_blocks.0.") and "_mod." not in name for name in moved), "a dense block"
    assert "double_blocks.0.img_mod.lin.weight" in moved

    moved = changed(shared, experts)
    assert {"double_blocks.2.txt_mlp.router.weight", "single_blocks.3.expert_mean", up} <= moved
    assert torch.equal(shared[up][:128], experts[up][:128])
    assert torch.equal(shared[linear2][:, :256], experts[linear2][:, :256])
    assert not [name for name in moved if "_mod." in name or "modulation" in name or "attn" in name]

    moved = changed(experts, blocks)
    inside = ("double_blocks.1.", "double_blocks.2.", "single_blocks.1.", "single_blocks.2.", "block_groups.")
    assert not [name for name in moved if not name.startswith(inside)]
    assert {"block_groups.0.router_x.weight", "block_groups.1.router_y.weight"} <= moved
    for stage in (shared, experts, blocks):
        assert torch.equal(convert["adaln_in.weight"], stage["adaln_in.weight"]), "which all blocks share"


def test_it_ends_with_a_student_and_leaves_nothing_of_the_way_there(finished: Path) -> None:
    config = check_file(finished / "student.safetensors")
    assert (config.gate.mode, config.gate.scale, config.split_only) == ("normalised", 2.0, False)
    assert not changed(weights(finished, "blocks"), load_file(finished / "student.safetensors"))
    for stage in STAGES:
        assert {path.name for path in (finished / stage).iterdir()} == {
            "log.jsonl",
            "student.safetensors",
        }


def test_steps_count_over_all_parts_and_every_line_names_its_own(finished: Path) -> None:
    lines = steps(finished, "experts")
    assert [line["step"] for line in lines] == list(range(1, 6 * STEPS + 1))
    names = ["double_blocks.1", "double_blocks.2", *SINGLES]
    assert [line["block"] for line in lines] == [name for name in names for _ in range(STEPS)]
    assert {"loss/features", "loss/balance", "learning_rate", "grad_norm"} <= lines[0].keys()
    routers = {line["block"] for line in log(finished, "experts") if "router/largest_load" in line}
    assert routers == set(names)
    assert "loss/block_balance" in steps(finished, "blocks")[0]


def test_a_relative_loss_of_one_is_that_of_blocks_that_do_nothing() -> None:
    def features(value: float) -> Features:
        return Features(image_BTH=torch.full((2, 3, 4), value), text_BLH=torch.full((2, 5, 4), 2 * value))

    given, wanted = features(1.0), features(3.0)
    for kind, streams in (("double", {"img", "txt"}), ("single", {"both"})):
        nothing = relative_losses(kind, given, wanted, given)
        assert nothing.keys() == streams
        assert all(float(loss) == pytest.approx(1) for loss in nothing.values())
        half = relative_losses(kind, given, wanted, features(2.0))
        assert all(float(loss) == pytest.approx(0.25) for loss in half.values())
    unchanged = relative_losses("double", given, given, given)
    assert all(float(loss) == 0 for loss in unchanged.values())


def test_a_checkpointed_group_has_the_same_gradients(room: Path) -> None:
    core = FluxMoETransformer2DModel.from_flux_moe(room / "out" / "convert" / "student.safetensors").train()
    part = Part(name="block_groups.1", kind="single", blocks=(1, 2), start=4, end=6, group=1)
    generator = torch.Generator().manual_seed(0)
    image, text, temb = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 128), (3, 2, 128), (3, 128)))
    rotary = core.pos_embed(torch.zeros(6, 3))
    found = []
    for checkpointing in (False, True):
        blocks = PartBlocks(core, part, checkpointing=checkpointing)
        blocks.zero_grad()
        image_out, text_out = blocks(image, text, temb, rotary)
        (image_out.square().mean() + text_out.square().mean()).backward()
        found.append({n: p.grad.clone() for n, p in blocks.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert found[0]["router.router_x.weight"].abs().max() > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# Stopping and going on


class Killed(BaseException):
    """The process ends here."""


def killed_at(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int, *, after: bool) -> None:
    """The run dies at a call of a method, counted from 1, before it has done anything or when it has done all."""
    real: Callable[..., Any] = getattr(owner, method)
    calls = [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise Killed
        result = real(*args, **kwargs)
        if calls[0] == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, method, dying)


@pytest.mark.parametrize(
    ("owner", "method", "call", "after"),
    [
        pytest.param(Store, "put", 5, False, id="while the data are embedded"),
        pytest.param(Store, "put", 20, True, id="while the teacher makes the first features"),
        pytest.param(StageLog, "step", 4, False, id="in the first group, after a checkpoint"),
        pytest.param(StageLog, "step", STEPS, True, id="at a group's last step"),
        pytest.param(TensorWriter, "finish", 2, False, id="before a group is written"),
        pytest.param(TensorWriter, "finish", 1, True, id="when a group has just been written"),
        pytest.param(TensorWriter, "finish", 3, False, id="before the student is written"),
    ],
)
def test_a_run_killed_anywhere_ends_bit_for_bit_where_the_other_ends(
    room: Path, begun: Path, finished: Path, monkeypatch: pytest.MonkeyPatch,
    owner: type, method: str, call: int, after: bool,
) -> None:  # fmt: skip
    again = arguments(room, begun, "stages=[blocks]")
    with monkeypatch.context() as dying:
        killed_at(dying, owner, method, call, after=after)
        with pytest.raises(Killed):
            main(again)
    assert main(again) == 0
    assert not changed(weights(finished, "blocks"), weights(begun, "blocks"))
    timed = ("seconds", "tokens_per_second")
    alike = [
        [{k: v for k, v in line.items() if k not in timed} for line in steps(o, "blocks")] for o in (finished, begun)
    ]
    assert alike[0] == alike[1]
    assert errors(begun, "blocks") == errors(finished, "blocks")


def test_a_process_that_is_killed_goes_on_at_its_last_checkpoint(room: Path, begun: Path, finished: Path) -> None:
    again = arguments(room, begun, "stages=[blocks]")
    process = Run(again)
    while not (begun / "blocks" / "checkpoints" / "block_groups.1").exists():
        assert process.poll() is None, "it ended before that group"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(again) == 0
    assert not changed(weights(finished, "blocks"), weights(begun, "blocks"))
    resumed = [line["step"] for line in log(begun, "blocks") if line.get("event") == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= STEPS


def test_a_part_goes_on_to_more_steps_and_those_that_are_trained_stay(
    room: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second group, after a checkpoint."""
    with monkeypatch.context() as dying:
        killed_at(dying, StageLog, "step", STEPS + 3, after=True)
        with pytest.raises(Killed):
            main(arguments(room, begun, "stages=[blocks]"))
    first = load_file(begun / "blocks" / "parts" / "block_groups.0.safetensors")
    again = arguments(room, begun, "stages=[blocks]", "resume=changed")
    assert main([*again, f"stage.blocks.steps={STEPS - 1}"]) == 2
    assert f"stage.blocks.steps is {STEPS - 1}, but {STEPS} are done of a block already" in capsys.readouterr().err
    assert main([*again, f"stage.blocks.steps={STEPS + 2}"]) == 0
    said = capsys.readouterr().out
    assert f"blocks: {STEPS + 2} steps instead of {STEPS}" in said
    assert "Blocks that are trained already stay as they are." in said
    after = weights(begun, "blocks")
    assert all(torch.equal(after[name], tensor) for name, tensor in first.items())
    last = [line["step"] for line in steps(begun, "blocks") if line["block"] == "block_groups.1"][-1]
    assert last == 2 * (STEPS + 2)
    (begun / "blocks" / "parts").mkdir()  # as a kill leaves it when the student has just been written
    assert main([*again, f"stage.blocks.steps={STEPS + 4}"]) == 0
    assert not (begun / "blocks" / "parts").exists()
    assert "Its blocks are trained; restart=blocks repeats them with other steps." in capsys.readouterr().out


def test_sigterm_saves_and_the_run_goes_on_there(
    room: Path, begun: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = arguments(room, begun, "stages=[blocks]", "checkpoints.every=1000")
    real = StageLog.step

    def asked(self: StageLog, step: int, *args: Any, **kwargs: Any) -> None:
        real(self, step, *args, **kwargs)
        if step == 2:  # asked for at the next step's end, with what else the host waits for
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StageLog, "step", asked)
        assert main(again) == 143
    assert [path.name for path in (begun / "blocks" / "checkpoints" / "block_groups.0").iterdir()] == ["step-000003"]
    assert main(again) == 0
    assert not changed(weights(finished, "blocks"), weights(begun, "blocks"))


def test_a_full_disk_stops_the_run_with_all_that_it_has(
    room: Path, begun: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = arguments(room, begun, "stages=[blocks]")
    real, calls = Path.write_bytes, [0]

    def full(path: Path, data: bytes) -> int:
        calls[0] += 1
        if calls[0] > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert main(again) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert main(again) == 0
    assert not changed(weights(finished, "blocks"), weights(begun, "blocks"))


def test_what_a_stage_takes_of_the_disk_is_said_and_asked_for_ahead(
    room: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(room)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(arguments(room, begun, "stages=[blocks]")) == 2
    said = capsys.readouterr()
    assert "2 parts of 4 steps each" in said.out
    assert "stage blocks needs" in said.err
    assert "training.blockwise_samples" in said.err
    assert not list((begun / "blocks").glob("features/depth-*"))


# Other students


def test_a_block_that_stands_for_a_pruned_group_learns_what_the_group_did(tmp_path: Path) -> None:
    """Depth pruning blockwise (Lite, Table 3)."""
    dense = files.dense_flux(DIMS)
    save_file(dense, tmp_path / "dense.safetensors")
    kept: TeacherBlocks = {"double": [0, 2], "single": [0, 1, 3]}
    with open_teacher(tmp_path / "dense.safetensors") as teacher:
        shallow = ShallowTeacher(teacher, kept)
        student = {name: shallow.tensor(name).clone() for name in shallow.shapes}
    moe = FluxMoEConfig.from_json(bytes(files.split(dense, DIMS)["d2m_config"].numpy()))
    provenance = {"teacher_blocks": kept, "teacher_outputs": output_blocks(GROUPS, kept)}
    config = replace(moe, dims=shallow.dims, ffns={}, groups=(), provenance=provenance, split_only=False)
    student["d2m_config"] = files.config_tensor(config.to_json())
    assert parts("blocks", config) == {"double_blocks.1": (1, 3), "single_blocks.1": (4, 6)}
    stage = {name: {"steps": 8 if name == "blocks" else 0, "learning_rate": 3e-4} for name in STAGES}
    assert main(prepare(tmp_path, student, dense, stages=["blocks", "export"], stage=stage)) == 0
    out = tmp_path / "out"
    assert all(after < before for before, after in errors(out, "blocks").values())
    moved = changed(weights(out, "convert"), load_file(out / "student.safetensors"))
    assert {name.rsplit(".", 3)[0] for name in moved} >= {"double_blocks.1", "single_blocks.1"}
    assert not [name for name in moved if not name.startswith(("double_blocks.1.", "single_blocks.1."))]


def test_a_capacity_router_is_trained_with_its_thresholds(tmp_path: Path) -> None:
    dense = files.dense_flux(DIMS)
    student = files.split(dense, DIMS, capacity=CapacityRouter(capacity=2.0, width=16))
    stages = {stage: {"steps": 0 if stage == "shared" else 2, "learning_rate": 1e-3} for stage in STAGES}
    assert main(prepare(tmp_path, student, dense, stages=["shared", "experts"], stage=stages)) == 0
    out = tmp_path / "out"
    moved = changed(weights(out, "shared"), weights(out, "experts"))
    assert {"single_blocks.1.threshold", "single_blocks.1.capacity.in_layer.weight"} <= moved
    assert "double_blocks.1.txt_mlp.threshold" in moved
    assert all("loss/predictor" in line for line in steps(out, "experts"))


def test_end_to_end_distillation_begins_with_what_blockwise_mode_has_made(
    room: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"student.start={finished / 'student.safetensors'}"
    end_to_end = [start, "training.blockwise=false", "stages=[convert, experts]", "stage.shared.steps=0"]
    out = tmp_path / "out"
    assert main(arguments(room, out, *end_to_end, "stage.experts.steps=1")) == 0
    assert not changed(load_file(finished / "student.safetensors"), weights(out, "convert"))
    assert "loss/output" in steps(out, "experts")[0]
    assert any("validation/loss" in line for line in log(out, "experts"))
    other = tmp_path / "other.safetensors"
    save_file(files.dense_flux(replace(DIMS, single_blocks=5)), other)
    again = arguments(room, tmp_path / "again", *end_to_end, f"teacher.path={other}")
    assert main(again) == 2
    assert "was made from another teacher" in capsys.readouterr().err


# What goes wrong


def test_what_blockwise_mode_does_not_do_is_said(room: Path, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Two:
        strategy, count = "ddp", 2

    run = load_run(room / "run-file.yaml")
    with pytest.raises(UserError, match="single process; here are 2"):
        check_blockwise(run, Two())  # type: ignore[arg-type]
    for override, said in (
        ("teacher.quantise=fp8", "leave out teacher.quantise"),
        ("losses.feature=0", "losses.feature is 0"),
        ("stage.blocks.trainable=['*.routed_up', 'x_embedder.*']", "x_embedder.bias is in no block"),
    ):
        assert main(arguments(room, begun, "stages=[blocks]", override)) == 2
        assert said in capsys.readouterr().err
        (begun / "run.yaml").unlink(missing_ok=True)

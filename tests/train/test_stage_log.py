"""The log of a running stage, read back from the files that a user opens."""

from __future__ import annotations

import io
import json
import sys
import types
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tqdm
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2m_train import UserError
from d2m_train.monitor.stage_log import StageLog, read_stage_log
from d2m_train.monitor.tensorboard import describe_stage
from d2m_train.run_config import EyesSection, RunConfig

MINIMAL = {
    "output_dir": "out",
    "teacher": {"path": "teacher.safetensors"},
    "student": {"preset": "L"},
    "data": {"source": "emoji"},
}


def open_eyes(folder: Path, *, start: int = 0, steps: int = 10, main: bool = True,
              describe: Any = lambda writer: None, **section: Any) -> StageLog:  # fmt: skip
    eyes = EyesSection(log_every=4, **section)
    return StageLog(folder / "shared", folder / "tensorboard", eyes, stage="shared", steps=steps, start=start, main=main,
                run_name="a run", describe=describe)  # fmt: skip


def take(eyes: StageLog, steps: range) -> None:
    for step in steps:
        losses: dict[str, float | torch.Tensor] = {
            "total": torch.tensor(float(step), requires_grad=True),
            "output": step / 10,
        }
        eyes.step(step, losses, tokens=100, learning_rate=step / 1000, grad_norm=2.0)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard" / "shared"), {"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_each_interval_is_one_line_of_means_and_the_last_may_be_short(tmp_path: Path) -> None:
    with open_eyes(tmp_path) as eyes:
        take(eyes, range(1, 11))
    lines = read_stage_log(tmp_path / "shared" / "log.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert [line["loss/total"] for line in lines] == [2.5, 6.5, 9.5]
    assert lines[0]["loss/output"] == pytest.approx(0.25)
    assert [line["mean_of_steps"] for line in lines] == [4, 4, 2]
    assert [line["learning_rate"] for line in lines] == [0.004, 0.008, 0.010]
    assert all(line["grad_norm"] == 2 and line["tokens_per_second"] > 0 for line in lines)
    scalars = events(tmp_path).Scalars("loss/total")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(4, 2.5), (8, 6.5), (10, 9.5)]


def test_an_interrupted_interval_is_written_when_the_stage_is_stopped(tmp_path: Path) -> None:
    eyes = open_eyes(tmp_path)
    take(eyes, range(1, 7))
    eyes.event("stopped", message="SIGTERM")
    eyes.close()
    eyes.close()
    lines = read_stage_log(tmp_path / "shared" / "log.jsonl")
    assert [line["step"] for line in lines] == [4, 6, 6]
    assert lines[1] == {"event": "stopped", "step": 6, "message": "SIGTERM"}
    assert lines[2]["loss/total"] == 5.5


def test_a_resumed_log_is_cut_at_its_checkpoint_and_says_so(tmp_path: Path) -> None:
    with open_eyes(tmp_path, steps=20) as eyes:
        take(eyes, range(1, 9))
        eyes.event("saved")
        eyes.scalars(8, {"loss": 1.0}, "validation")
        take(eyes, range(9, 16))
        eyes.scalars(12, {"loss": 2.0}, "validation")
    log = tmp_path / "shared" / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 16, "loss/to')  # what a crash leaves
    with open_eyes(tmp_path, steps=20, start=8) as eyes:
        take(eyes, range(9, 21))
    lines = read_stage_log(log)
    assert all(json.loads(line) for line in log.read_text().splitlines())
    assert [(line["step"], line.get("event")) for line in lines] == [
        (4, None), (8, None), (8, "saved"), (8, None), (8, "resumed"), (12, None), (16, None), (20, None),
    ]  # fmt: skip
    assert lines[4]["reached"] == 15, "how much the interruption cost"
    shown = events(tmp_path)
    assert [scalar.step for scalar in shown.Scalars("loss/total")] == [4, 8, 12, 16, 20]
    assert [scalar.step for scalar in shown.Scalars("validation/loss")] == [8]


def test_a_stage_that_begins_again_leaves_nothing_of_the_attempt_before(tmp_path: Path) -> None:
    with open_eyes(tmp_path) as eyes:
        eyes.scalars(0, {"loss": 5.0}, "validation")
        take(eyes, range(1, 7))
    with open_eyes(tmp_path) as eyes:
        eyes.scalars(0, {"loss": 3.0}, "validation")
        take(eyes, range(1, 5))
    lines = read_stage_log(tmp_path / "shared" / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 4]
    assert (lines[0]["event"], lines[0]["reached"]) == ("resumed", 6)
    assert lines[1]["validation/loss"] == 3
    assert [scalar.value for scalar in events(tmp_path).Scalars("validation/loss")] == [3]


def test_an_image_is_a_file_and_stands_in_tensorboard(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    with open_eyes(tmp_path) as eyes:
        file = eyes.image(500, "samples", Image.fromarray(pixels))
    assert file == tmp_path / "shared" / "samples" / "step-000500.png"
    assert np.array_equal(np.asarray(Image.open(file)), pixels)
    (shown,) = events(tmp_path).Images("samples")
    assert shown.step == 500
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), pixels)


def test_what_is_not_finite_leaves_the_log_readable(tmp_path: Path) -> None:
    with open_eyes(tmp_path) as eyes:
        eyes.scalars(1, {"loss": float("nan")}, "validation")
    (line,) = (tmp_path / "shared" / "log.jsonl").read_text().splitlines()
    assert "NaN" not in line
    assert json.loads(line) == {"step": 1, "validation/loss": None}


def test_the_bar_shows_losses_speed_and_how_long_it_will_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm.tqdm, disable=False))  # whatever TQDM_DISABLE said at its import
    with redirect_stderr(io.StringIO()) as said:
        eyes = open_eyes(tmp_path, start=2)
        take(eyes, range(3, 9))
        eyes._bar.refresh()
        eyes.event("warning", message="expert 3 of single_blocks.0 is dead")
        eyes.close()
    text = said.getvalue()
    assert "resumed: step 2" in text
    assert "warning: expert 3 of single_blocks.0 is dead" in text
    bar = [line for line in text.replace("\r", "\n").splitlines() if "8/10" in line][-1]
    for part in ("shared:", "total=6.5", "output=0.65", "tokens/s=", "<"):
        assert part in bar


def test_setting_up_does_not_count_in_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm.tqdm, disable=False))
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with redirect_stderr(io.StringIO()), open_eyes(tmp_path) as eyes:
        monkeypatch.setattr(eyes._bar, "_time", lambda: now[0])
        eyes._bar.start_t = eyes._bar.last_print_t = now[0]
        with eyes.set_up():
            now[0] += 500
        assert eyes._bar.format_dict["elapsed"] == 0
        now[0] += 20
        take(eyes, range(1, 5))
    assert eyes._bar.format_dict["elapsed"] == 20
    assert read_stage_log(tmp_path / "shared" / "log.jsonl")[0]["tokens_per_second"] == pytest.approx(20)


def test_the_last_measurement_is_known_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_eyes(tmp_path) as eyes:
        assert eyes.last("validation/loss") is None
        eyes.scalars(2, {"validation/loss": 0.242})
        eyes.scalars(6, {"validation/loss": 0.2})
    with open_eyes(tmp_path, start=4) as eyes:
        assert eyes.last("validation/loss") == 0.242
        eyes.say("step 6: validation 0.242 → 0.2")
    assert "shared, step 6: validation 0.242 → 0.2\n" in capsys.readouterr().err


def test_tensorboard_has_the_runs_text_its_hyperparameters_and_no_chart_for_every_layer(tmp_path: Path) -> None:
    run = RunConfig.model_validate(MINIMAL | {"seed": 41})
    with open_eyes(tmp_path, describe=lambda writer: describe_stage(writer, run, "shared", 2)) as eyes:
        eyes.scalars(1, {"single_blocks.0/largest_load": 0.5, "largest_load": 0.25}, "router", uncharted=("single_",))
    shown = events(tmp_path)
    assert shown.Tags()["scalars"] == ["router/largest_load"]
    assert read_stage_log(tmp_path / "shared" / "log.jsonl")[0]["router/single_blocks.0/largest_load"] == 0.5
    content = {name: shown.SummaryMetadata(name).plugin_data.content for name in shown.PluginTagToContent("hparams")}
    assert b"global_batch" in content["_hparams_/session_start_info"]
    (text,) = shown.Tensors("run/text_summary")
    assert b"seed: 41" in text.tensor_proto.string_val[0]
    assert "custom_scalars__config__" in shown.Tags()["tensors"]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_eyes(tmp_path, main=False, wandb=True) as eyes:
        take(eyes, range(1, 11))
        eyes.scalars(3, {"loss": 1.0}, "validation")
        eyes.image(3, "samples", Image.new("RGB", (2, 2)))
        eyes.event("warning", message="nothing")
        with eyes.paused():
            pass
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_wandb_that_is_not_installed_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "meta_path", [_Without("wandb"), *sys.meta_path])
    with pytest.raises(UserError, match=r"eyes.wandb is true, but wandb is not installed: pip install wandb"):
        open_eyes(tmp_path, wandb=True)
    assert not list(tmp_path.iterdir())


class _Without:
    """An import system without one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands in for the service's client, which is no package of this project; it records what it is told."""
    told = types.SimpleNamespace(runs=[], logged=[], finished=0)
    module: Any = types.ModuleType("wandb")
    module.init = lambda **settings: told.runs.append(settings)
    module.log = told.logged.append
    module.define_metric = lambda *_, **__: None
    module.Image = lambda image: image.size
    module.finish = lambda: setattr(told, "finished", told.finished + 1)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_is_told_the_same_and_a_resumed_stage_goes_on_in_its_run(
    tmp_path: Path, wandb: types.SimpleNamespace
) -> None:
    with open_eyes(tmp_path, wandb=True) as eyes:
        take(eyes, range(1, 5))
        eyes.image(4, "samples", Image.new("RGB", (3, 2)))
    with open_eyes(tmp_path, wandb=True, start=4):
        pass
    assert (wandb.logged[0]["step"], wandb.logged[0]["loss/total"]) == (4, 2.5)
    assert wandb.logged[1] == {"step": 4, "samples": (3, 2)}
    first, second = wandb.runs
    assert first["name"] == "a run shared"
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert wandb.finished == 2

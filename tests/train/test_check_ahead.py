"""What would stop a later stage is said before the conversion."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from d2m_model.fields import ConfigError
from d2m_train import UserError
from d2m_train.commands import check_ahead
from d2m_train.commands.distill import prepare_folder
from d2m_train.run_file import load_run
from tests.toys.runs import DIMS, run_file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.compile=inducktor", "training.compile is inducktor; expected"),
        ("eyes.wandb=true", "eyes.wandb is true, but wandb is not installed"),
        ("training.optimizer=adamw_8bit", "bitsandbytes is not installed"),
        ("stage.blocks.trainable=[nothing.*]", r"stage\.blocks\.trainable: 'nothing\.\*' is no parameter"),
        ("student.top_k=13", "--top-k is 13; expected 1 to 12"),
        ("student.groups=[double:0-9]", "double"),
    ],
)
def test_it_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str) -> None:
    def find(name: str) -> Any:
        return None if name in ("wandb", "bitsandbytes") else importlib.util.find_spec(name)

    monkeypatch.setattr(check_ahead, "find_spec", find)
    run = load_run(run_file(tmp_path, student={"preset": "S"}), [override])
    with pytest.raises((UserError, ConfigError), match=message):
        check_ahead.check_ahead(run, DIMS)


def test_a_run_that_can_be_met_passes(tmp_path: Path) -> None:
    check_ahead.check_ahead(load_run(run_file(tmp_path), ["stage.shared.trainable=['*.norm1.linear.*']"]), DIMS)


def test_a_first_start_that_failed_does_not_block_the_corrected_one(tmp_path: Path) -> None:
    file = run_file(tmp_path)
    prepare_folder(load_run(file, ["student.preset=M"]))
    prepare_folder(run := load_run(file, ["student.preset=S"]))
    assert "preset: S" in (run.output_dir / "run.yaml").read_text()
    (run.output_dir / "convert").mkdir()
    (run.output_dir / "convert" / "student.safetensors").touch()
    with pytest.raises(UserError, match=r"student\.preset was 'S', is 'M'"):
        prepare_folder(load_run(file, ["student.preset=M", "resume=latest"]))
    with pytest.raises(UserError, match="holds a run already"):
        prepare_folder(run)
    (run.output_dir / "run.yaml").write_text("[" * 5000)
    with pytest.raises(UserError, match=r"run\.yaml: cannot be read"):
        prepare_folder(load_run(file, ["resume=latest"]))

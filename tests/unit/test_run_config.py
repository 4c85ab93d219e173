"""A run's YAML: defaults, overrides, and messages for mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from d2m_model.conversion.options import Importance
from d2m_train import UserError
from d2m_train.__main__ import main
from d2m_train.conversion.settings import settings_from_run
from d2m_train.run_config import STAGES
from d2m_train.run_file import load_run

MINIMAL = """
output_dir: runs/x
teacher: {path: flux.safetensors}
student: {preset: L}
data: {source: emoji}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    return tmp_path / "run.yaml"


def complaint(file: Path, text: str | None = None, *overrides: str) -> str:
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        load_run(file, overrides)
    return str(error.value)


def test_what_is_not_said_has_the_papers_values(file: Path) -> None:
    run = load_run(file)
    assert run.stages == STAGES == ("convert", "shared", "experts", "blocks", "export")
    assert (run.losses.feature, run.losses.balance, run.student.top_k) == (1.0, 0.01, 2)


def test_overrides_are_yaml_by_dotted_name(file: Path) -> None:
    run = load_run(
        file,
        [
            "stage.experts.learning_rate=2.0e-5",
            "stage.experts.steps=7",
            "training.batch_size=4",
            "stages=[shared, export]",
            "losses.outliers=null",
            "teacher.loras=[{path: hyper.safetensors, strength: 0.125}]",
            "output_dir=elsewhere",
        ],
    )
    assert (run.stage.experts.learning_rate, run.stage.experts.steps) == (2e-5, 7)
    assert run.training.batch_size == 4
    assert run.stages == ("shared", "export")
    assert run.losses.outliers is None
    assert run.teacher.loras[0].strength == 0.125
    assert run.output_dir == Path("elsewhere")


@pytest.mark.parametrize("importance", get_args(Importance))
def test_a_run_converts_by_every_importance_that_the_command_has(file: Path, importance: str) -> None:
    run = load_run(file, [f"convert.importance={importance}"])
    assert settings_from_run(run, teacher_path=Path("flux"), out=Path("out"), folder=None).importance == importance


def test_the_saved_run_says_everything_and_loads_again(file: Path, tmp_path: Path) -> None:
    run = load_run(file, ["stage.blocks.trainable=['*router*']"])
    (tmp_path / "saved.yaml").write_text(run.to_yaml())
    assert load_run(tmp_path / "saved.yaml") == run
    saved = yaml.safe_load(run.to_yaml())
    assert saved["training"]["betas"] == [0.9, 0.99]
    assert saved["stage"]["blocks"]["trainable"] == ["*router*"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batchsize=2", "training.batchsize is not a field; did you mean training.batch_size?"),
        ("trainig.batch_size=2", "trainig is not a field; did you mean training?"),
        ("batch_size=2", "batch_size is not a field; did you mean convert.batch_size or training.batch_size?"),
        ("stage.shred.steps=1", "stage.shred is not a field; did you mean stage.shared?"),
        ("training.ema.x=1", "training.ema is {'x': 1}: input should be a valid number"),
        ("teacher.loras={pth: a}", "teacher.loras.0.path is missing"),
        ("student.adaln_rank=some", "student.adaln_rank is 'some': input should be 'preset' or 'none'"),
        ("data.resolutions=[1000]", "data.resolutions.0 is 1000: input should be a multiple of 16"),
        ("student.xyzzy=1", "student.xyzzy is not a field (fields: preset, baseline, router"),
        ("training.batch_size=0", "training.batch_size is 0: input should be greater than or equal to 1"),
        ("training.batch_size=many", "training.batch_size is 'many': input should be a valid integer"),
        ("student.preset=XL", "student.preset is 'XL': input should be 'L', 'M', 'S' or 'XS'"),
        ("data.source=folder", "data: source folder needs a path"),
        ("data.path=x", "data: source emoji takes no path"),
        ("stages=[experts, shared]", "stages are experts, shared; expected each at most once, in the order convert"),
        ("seed", "'seed' is not an override; expected name=value, like training.batch_size=4"),
        ("seed.x=1", "seed is {'x': 1}: input should be a valid integer"),
    ],
)
def test_mistakes_are_named(file: Path, override: str, expected: str) -> None:
    assert expected in complaint(file, None, override)


def test_an_override_below_a_value_names_the_whole_field(file: Path) -> None:
    said = complaint(file, MINIMAL + "training: {batch_size: 2}\n", "training.batch_size.x=1")
    assert "training.batch_size has no fields of its own" in said


def test_one_value_stands_for_a_list_of_it(file: Path) -> None:
    run = load_run(
        file, ["stages=experts", "data.resolutions=512", "stage.experts.trainable='*'", "eyes.prompts=a cat, a hat"]
    )
    assert (run.stages, run.data.resolutions) == (("experts",), (512,))
    assert (run.stage.experts.trainable, run.stage.shared.trainable) == (("*",), None)
    assert run.eyes.prompts == ("a cat, a hat",)
    assert load_run(file, ["teacher.loras={path: a, strength: 2}"]).teacher.loras[0].strength == 2


def test_all_fields_are_listed_with_values_defaults_and_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--fields"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert "training.ema: number | null; default null" in lines
    assert (
        "stages: list of convert | shared | experts | blocks | export; default [convert, shared, experts, blocks, export]"
        in lines
    )
    assert "stage.experts.learning_rate: number; default 0.0001" in lines
    assert "teacher.path: path; required" in lines
    place = lines.index("training.batch_size: whole number; default 1")
    assert (
        lines[place + 1]
        == "    Samples per device and pass; the global batch is this times accumulation times processes."
    )


def test_every_mistake_is_told_at_once(file: Path) -> None:
    said = complaint(file, MINIMAL.replace("preset: L", "presett: L"))
    assert "student.preset is missing" in said
    assert "student.presett is not a field; did you mean student.preset?" in said


def test_a_file_that_is_none_is_said_so(file: Path, tmp_path: Path) -> None:
    assert "cannot be read (No such file" in complaint(tmp_path / "none.yaml")
    assert "not YAML" in complaint(file, "a: [")
    assert "expected fields such as teacher" in complaint(file, "just words")


def test_further_files_are_laid_over_the_first_section_by_section(tmp_path: Path) -> None:
    first, second = tmp_path / "run.yaml", tmp_path / "hardware.yaml"
    first.write_text(MINIMAL + "training: {batch_size: 4, ema: 0.9}\n")
    second.write_text(yaml.safe_dump({"training": {"batch_size": 2}}))
    run = load_run(first, [str(second), "training.accumulation=3"])
    assert (run.training.batch_size, run.training.accumulation, run.training.ema) == (2, 3, 0.9)

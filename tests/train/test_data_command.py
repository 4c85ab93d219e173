"""`python -m d2m_train cache`, and what a run's YAML may say of its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2m_train.__main__ import main
from d2m_train.data import open_source
from d2m_train.run_file import load_run
from tests.toys.pictures import SIZES, save_images

RUN = """
output_dir: {folder}
teacher: {{path: flux.safetensors}}
student: {{preset: L}}
data: {{source: folder, path: {folder}/images, resolutions: [64], text_encoders: emoji, vae: emoji}}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_images(tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"")
    (tmp_path / "images" / "broken.txt").write_text("a cat")
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    return tmp_path


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.safetensors")}


def test_the_cache_is_filled_and_summed_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", str(run / "run.yaml"), f"data.cache={run}/elsewhere"]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    broken = "broken.png: not a picture that Pillow knows"
    assert said == ["48 × 80 1", "64 × 64 5", "80 × 48 3", f"left out: 1 × broken image ({broken})"]
    assert len(entries(run / "elsewhere")) == 2 * len(SIZES)
    config = load_run(run / "run.yaml", [f"data.cache={run}/elsewhere"])
    before = entries(run)
    open_source(config.data, config.output_dir).batch(0, 2, seed=0)
    assert entries(run) == before


def test_processes_share_the_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2m_train.data.pictures.PART", 4)
    assert main(["cache", str(run / "run.yaml"), "--rank", "0", "--world", "2"]) == 0
    share = len(entries(run))
    monkeypatch.setenv("RANK", "1")  # as torchrun says it
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["cache", str(run / "run.yaml")]) == 0
    assert share < len(entries(run)) == 2 * len(SIZES)


def test_mistakes_are_said_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--rank", "2", "--world", "2"], "--rank 2 of --world 2: expected 0 … 1."),
        (["data.path=/nowhere"], "/nowhere: there is no such folder"),
        (["data.text_encoders=null"], "data: source folder needs text_encoders"),
        (["data.vae=null", "data.text_encoders=null"], "data: source folder needs text_encoders and vae"),
        (["data.resolutions=[100]"], "data.resolutions.0 is 100: input should be a multiple of 16"),
        (["data.pool=5"], "data: pool is only for source emoji"),
        (["data.source=prompts", "data.text_encoders=null"], "data: source prompts needs text_encoders"),
    ):
        assert main(["cache", str(run / "run.yaml"), *arguments]) == 2
        assert expected in capsys.readouterr().err

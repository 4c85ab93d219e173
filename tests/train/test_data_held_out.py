"""No sample of the validation is trained on, whatever the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2m_train.data import DataSource, open_source
from d2m_train.data.held_out import choose_held_out
from d2m_train.data.latents import LatentFile
from d2m_train.run_config import DataSection
from tests.toys.pictures import save_images
from tests.toys.pipeline import save_pipeline
from tests.toys.runs import write_latents


def test_a_content_is_held_out_or_not_whatever_others_there_are() -> None:
    contents = [str(number) for number in range(1000)]
    chosen = choose_held_out(contents, 0.1)
    assert 70 < sum(chosen) < 130
    assert choose_held_out([*contents[::-1], *contents], 0.1) == [*chosen[::-1], *chosen]
    assert choose_held_out(contents[:500], 0.1) == chosen[:500]
    assert all(more for more, held in zip(choose_held_out(contents, 0.3), chosen, strict=True) if held)


def test_small_data_hold_out_one_content_and_keep_one() -> None:
    assert sum(choose_held_out(list("abcd"), 0.01)) == 1
    assert sum(choose_held_out(list("abcd"), 0.99)) <= 3
    assert choose_held_out(list("aaa"), 0.5) == [False] * 3
    assert choose_held_out(list("abc"), 0) == [False] * 3
    assert choose_held_out([], 0.5) == []


def samples(source: DataSource, *, held_out: bool) -> set[bytes]:
    """What the first batches consist of: latents, or features of prompts."""
    source.prepare()
    found: set[bytes] = set()
    for index in range(24):
        batch = source.batch(index, 1, 0, held_out=held_out)
        found.add((batch.context_BLD if batch.tokens_BTC is None else batch.tokens_BTC).numpy().tobytes())
    return found


def write_data(folder: Path, kind: str) -> None:
    if kind == "latents":
        write_latents(folder)
    else:
        save_pipeline(folder / "pipeline")
        save_images(folder / "images")
        (folder / "prompts.txt").write_text("".join(f"{letter * 3}\n" for letter in "abcdefghijkl"))


def opened(folder: Path, kind: str, **fields: Any) -> DataSource:
    settings: dict[str, Any] = {"source": kind, "held_out": 0.3, **fields}
    name = {"latents": "latents.safetensors", "folder": "images", "prompts": "prompts.txt"}[kind]
    settings |= {"path": folder / name, "resolutions": (64,), "encoder_dtype": "float32", "text_tokens": 20}
    if kind != "latents":
        settings |= dict.fromkeys(("text_encoders", "vae"), str(folder / "pipeline"))
    return open_source(DataSection.model_validate(settings), folder)


@pytest.mark.parametrize("kind", ["latents", "folder", "prompts"])
def test_samples_are_trained_on_or_held_out(tmp_path: Path, kind: str) -> None:
    write_data(tmp_path, kind)
    source = opened(tmp_path, kind)
    trained, held_out = samples(source, held_out=False), samples(source, held_out=True)
    assert trained
    assert held_out
    assert not trained & held_out
    assert f"{len(held_out)} of them held out for validation" in source.split_text()
    again = opened(tmp_path, kind)
    assert again.identity == source.identity != opened(tmp_path, kind, held_out=0.31).identity
    assert samples(again, held_out=True) == held_out


def test_the_same_latents_twice_are_on_one_side(tmp_path: Path) -> None:
    write_latents(tmp_path)
    file = LatentFile(tmp_path / "latents.safetensors").file
    twice = {name: torch.cat([file.tensor(name)] * 2) for name in file.shapes}
    save_file(twice, tmp_path / "twice.safetensors")
    source = LatentFile(tmp_path / "twice.safetensors", held_out=0.3)
    assert not samples(source, held_out=False) & samples(source, held_out=True)


def test_other_data_can_be_named_for_validation(tmp_path: Path) -> None:
    write_latents(tmp_path)
    file = LatentFile(tmp_path / "latents.safetensors").file
    other = {name: file.tensor(name) + (name == "latents") for name in file.shapes}
    save_file(other, tmp_path / "other.safetensors")
    source = opened(tmp_path, "latents", held_out=str(tmp_path / "other.safetensors"))
    assert samples(source, held_out=False) == samples(opened(tmp_path, "latents", held_out=0), held_out=False)
    named = LatentFile(tmp_path / "other.safetensors")
    assert samples(source, held_out=True) == samples(named, held_out=False)
    assert "other.safetensors" in source.split_text()


def test_of_one_sample_none_is_held_out_and_that_is_said(tmp_path: Path) -> None:
    write_latents(tmp_path)
    file = LatentFile(tmp_path / "latents.safetensors").file
    save_file({name: file.tensor(name)[:1].clone() for name in file.shapes}, tmp_path / "one.safetensors")
    source = LatentFile(tmp_path / "one.safetensors", held_out=0.3)
    assert samples(source, held_out=True) == samples(source, held_out=False)
    assert "none of them held out" in source.split_text()

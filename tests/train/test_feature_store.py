"""The teacher's features on the disk: which they are, how many, and what happens to damaged ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_train.blockwise.feature_store import FeatureStore
from d2m_train.data.latents import LatentFile
from d2m_train.data.store import Store
from d2m_train.distillation.features import block_outputs
from d2m_train.flow.noise import noisy_batch
from d2m_train.flow.velocity import velocity
from d2m_train.run_config import RunConfig
from d2m_train.run_file import load_run
from d2m_train.teacher.frozen import open_frozen_teacher
from tests.toys.blockwise_runs import grouped, prepare


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, data, the run's file, and the converted student in `out`."""
    folder = tmp_path_factory.mktemp("blockwise")
    prepare(folder, *grouped())
    return folder


def features_of(room: Path, folder: Path, **overrides: Any) -> tuple[FeatureStore, RunConfig, list[str]]:
    run = load_run(room / "run-file.yaml", [f"output_dir={folder}"])
    teacher = open_frozen_teacher(run.teacher.model_copy(update={"offload": "stream"}))
    said: list[str] = []
    data = LatentFile(room / "latents.safetensors")
    return FeatureStore(folder / "features", teacher, data, run, report=said.append, **overrides), run, said


def test_the_features_are_the_teachers_own_of_the_batches_that_training_asks(room: Path, tmp_path: Path) -> None:
    store, run, _ = features_of(room, tmp_path)
    store.provide(2, 5)
    teacher = open_frozen_teacher(run.teacher)
    for index in range(store.batches):
        batch = LatentFile(room / "latents.safetensors").batch(index, 2, run.seed)
        noisy = noisy_batch(batch, run.timesteps, run.seed, index, teacher)
        with torch.no_grad(), block_outputs(teacher, ["double_blocks.1", "single_blocks.1"]) as found:
            velocity(teacher, batch, noisy.tokens_BTC, noisy.t_B, batch.guidance_B, True)
        double, single = store.features(2, index), store.features(5, index)
        assert torch.equal(double.image_BTH, found["double_blocks.1.img"])
        assert torch.equal(double.text_BLH, found["double_blocks.1.txt"])
        assert torch.equal(torch.cat([single.text_BLH, single.image_BTH], 1), found["single_blocks.1"])
        assert torch.equal(store.conditions(index).words_BL, batch.words_BL)
    seen = {float(store.features(2, index).image_BTH.sum()) for index in range(store.batches + store.held_out)}
    assert len(seen) == store.batches + store.held_out, "what is held out is not trained on"


def test_two_depths_are_on_the_disk_and_no_more_than_one_entry_besides(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = features_of(room, tmp_path)
    most, put = [0], Store.put

    def counting(self: Store, *entry: Any) -> None:
        put(self, *entry)
        most.append(len(list((tmp_path / "features").glob("depth-*/*/*.safetensors"))))

    monkeypatch.setattr(Store, "put", counting)
    entries = store.batches + store.held_out
    for start, end in ((0, 1), (1, 2), (2, 6), (7, 7)):
        store.provide(start, end)
        there = {folder.name for folder in (tmp_path / "features").glob("depth-*")}
        assert there == {f"depth-{start:02}", f"depth-{end:02}"}
    assert max(most) == 2 * entries + 1


def test_a_damaged_or_missing_entry_is_made_again_as_it_was(room: Path, tmp_path: Path) -> None:
    store, _, _ = features_of(room, tmp_path)
    store.provide(3, 4)
    expected = [store.features(depth, index).image_BTH.clone() for depth in (3, 4) for index in range(store.batches)]
    entries = sorted((tmp_path / "features").glob("*/*/*.safetensors"))
    for number, entry in enumerate(entries):
        if number % 3 == 0:
            data = bytearray(entry.read_bytes())
            data[-5] ^= 1
            entry.write_bytes(data)
        elif number % 3 == 1:
            entry.unlink()
    again, _, said = features_of(room, tmp_path)
    again.provide(3, 4)
    found = [again.features(depth, index).image_BTH for depth in (3, 4) for index in range(again.batches)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert any("depth-04" in line and "made again" in line for line in said)

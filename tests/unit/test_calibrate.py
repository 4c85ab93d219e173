"""Calibration: its data, the loss, what is recorded, and going on after an interruption."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model.config import all_ffn_names
from tests.toys.teachers import DIMS, save_flux

pytest.importorskip("diffusers")

from d2m_model.conversion.calibration import Calibration
from d2m_model.conversion.recorder import VECS_PER_SAMPLE
from d2m_model.hosts.diffusers import load_transformer
from d2m_train import UserError
from d2m_train.conversion.calibrate import CalibrationBatches, calibrate_on_batches, flow_matching_loss
from d2m_train.data.emoji import EmojiData
from d2m_train.data.latents import LatentFile

FFNS = all_ffn_names(DIMS)
SETTINGS = CalibrationBatches(batches=3, batch_size=2, tokens=12, taylor=True, seed=0)


def save_calibration(path: Path, samples: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "latents": torch.randn(samples, 16, 4, 6, generator=generator),
        "context": torch.randn(samples, 3, 32, generator=generator),
        "pooled": torch.randn(samples, 48, generator=generator),
    }
    save_file(tensors, path)


def run(
    folder: Path, settings: CalibrationBatches = SETTINGS, teacher: str = "flux", losses: list | None = None
) -> Calibration:
    """On the files flux.safetensors and data.safetensors beside `folder`."""
    return calibrate_on_batches(
        lambda: load_transformer(folder.parent / "flux.safetensors", torch.float32),
        DIMS,
        FFNS,
        LatentFile(folder.parent / "data.safetensors"),
        settings,
        folder,
        teacher,
        [].append if losses is None else losses.append,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_flux(tmp_path / "flux.safetensors")
    save_calibration(tmp_path / "data.safetensors")
    return tmp_path / "calibration"


# Data


def test_calibration_samples_become_patches_with_their_places(tmp_path: Path) -> None:
    save_calibration(tmp_path / "data.safetensors")
    data = LatentFile(tmp_path / "data.safetensors")
    batches = [data.batch(index, 4, seed=0) for index in range(2)]
    assert [len(batch.tokens_BTC) for batch in batches] == [4, 4]  # three samples, again from the start
    batch = batches[0]
    assert batch.tokens_BTC.shape == (4, 6, 64)
    assert batch.image_ids_T3.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert batch.guidance_B.min() >= 1.5
    assert batch.guidance_B.max() <= 5


def test_the_emoji_dataset_calibrates_too(tmp_path: Path) -> None:
    from demo import dataset
    from demo.prompt_encoder import PromptEncoder
    from demo.train import vocabulary

    with pytest.raises(UserError, match=r"autoencoder\.safetensors is missing"):
        EmojiData(tmp_path)
    shutil.copytree(dataset.EMOJI_AUTOENCODER.parent, tmp_path / "vae")
    PromptEncoder(vocabulary()).save(tmp_path / "prompt-encoder.safetensors")
    first, second = (EmojiData(tmp_path).batch(index, 3, seed=0) for index in range(2))
    assert first.tokens_BTC.shape == (3, 64, 64)
    assert first.context_BLD.shape == (3, 12, 128)
    assert first.pooled_BV.shape == (3, 128)
    assert 0.7 < first.tokens_BTC.std() < 1.4  # FLUX's model space
    assert not torch.equal(first.tokens_BTC, second.tokens_BTC)
    again = EmojiData(tmp_path).batch(1, 3, seed=0)
    assert torch.equal(second.tokens_BTC, again.tokens_BTC)
    assert 3 <= first.words_BL.sum(1).min() < first.words_BL.sum(1).max() <= 12


def test_every_sample_of_a_file_is_used_before_one_comes_again(tmp_path: Path) -> None:
    save_calibration(tmp_path / "data.safetensors", samples=5)
    data = LatentFile(tmp_path / "data.safetensors")
    pooled = torch.cat([data.batch(index, 2, seed=0).pooled_BV for index in range(5)])
    stored = load_file(tmp_path / "data.safetensors")["pooled"]
    which = [int((row == stored).all(1).nonzero()) for row in pooled]
    assert sorted(which[:5]) == sorted(which[5:]) == [0, 1, 2, 3, 4]


# What is recorded


def test_the_loss_is_that_of_flow_matching(tmp_path: Path) -> None:
    """A model that always answers noise - image has none; noise level 1 shows it noise alone, 0 the image."""
    save_calibration(tmp_path / "data.safetensors")
    batch = LatentFile(tmp_path / "data.safetensors").batch(0, 2, seed=0)
    seen: list[torch.Tensor] = []

    class Oracle(torch.nn.Linear):
        config = type("Config", (), {"guidance_embeds": False})

        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor]:  # type: ignore[override]
            seen.append(hidden_states)
            noise = torch.randn(batch.tokens_BTC.shape, generator=torch.Generator().manual_seed(3))
            return (noise - batch.tokens_BTC,)

    levels = torch.tensor([0.0, 1.0])
    loss = flow_matching_loss(Oracle(1, 1), batch, levels, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    assert loss == 0
    noise = torch.randn(batch.tokens_BTC.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(seen[0][0], batch.tokens_BTC[0])
    torch.testing.assert_close(seen[0][1], noise[1])


def test_taylor_importance_finds_the_neurons_that_the_output_depends_on(tmp_path: Path) -> None:
    tensors = save_flux(tmp_path / "flux.safetensors", dtype=torch.float32)
    dead = torch.arange(0, 512, 2)
    for ffn, columns in (("single_blocks.0.linear2", dead + 128), ("double_blocks.0.img_mlp.2", dead)):
        tensors[f"{ffn}.weight"][:, columns] = 0  # what they compute goes nowhere
    save_file(tensors, tmp_path / "flux.safetensors")
    save_calibration(tmp_path / "data.safetensors")
    losses: list[float] = []
    calibration = run(tmp_path / "calibration", losses=losses)
    scores = {ffn: calibration.importance(ffn) for ffn in FFNS}
    assert len(losses) == 3
    assert losses == calibration.losses
    for ffn in ("single_blocks.0", "double_blocks.0.img_mlp"):
        assert scores[ffn][dead].max() == 0
        assert scores[ffn][dead + 1].min() > 0
    assert all(scores[ffn].isfinite().all() for ffn in scores)


def test_inputs_are_what_the_ffns_read_and_leave_padding_out(folder: Path) -> None:
    path = folder.parent / "data.safetensors"
    stored = load_file(path) | {"text_tokens": torch.tensor([2, 1, 2])}
    stored["context"][0, 2], stored["context"][1, 1:], stored["context"][2, 2] = 1e4, 1e4, 1e4  # padding, if it is seen
    save_file(stored, path)
    calibration = run(folder, replace(SETTINGS, tokens=10_000))
    text = calibration.inputs("double_blocks.0.txt_mlp")
    words = 2 * (2 + 1 + 2)  # every sample comes twice in three batches of two
    assert text.shape == (words, 128)
    assert calibration.inputs("double_blocks.0.img_mlp").shape == (6 * 6, 128)
    assert calibration.inputs("single_blocks.1").shape == (6 * 6 + words, 128)

    model = load_transformer(folder.parent / "flux.safetensors", torch.float32)
    seen: list[torch.Tensor] = []
    model.transformer_blocks[0].ff.net[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    calibrate_on_batches(
        lambda: model, DIMS, FFNS, LatentFile(path), replace(SETTINGS, tokens=10_000), folder.with_name("other"), "flux"
    )
    found = {tuple(row.tolist()) for row in calibration.inputs("double_blocks.0.img_mlp")}
    assert found == {tuple(row.tolist()) for row in torch.cat(seen).flatten(0, 1)}


def test_no_more_inputs_than_wanted_are_kept(folder: Path) -> None:
    assert run(folder).inputs("single_blocks.0").shape == (12, 128)


def test_moments_are_those_of_the_models_own_conditioning(folder: Path) -> None:
    moments = run(folder).moments()
    model = load_transformer(folder.parent / "flux.safetensors", torch.float32)
    pooled = load_file(folder.parent / "data.safetensors")["pooled"].repeat(3000, 1)
    t, guidance = torch.rand(9000) * 1000, (1.5 + 3.5 * torch.rand(9000)) * 1000
    with torch.no_grad():
        expected = torch.nn.functional.silu(model.time_text_embed(t, guidance, pooled)).double()
    spread = (expected - expected.mean(0)).norm(dim=1).mean()
    assert (moments.mean_H - expected.mean(0)).norm() < 4 * spread / (6 * VECS_PER_SAMPLE) ** 0.5
    assert float(moments.covariance_HH.trace()) == pytest.approx(float(torch.cov(expected.T).trace()), rel=0.2)


def test_without_taylor_nothing_is_differentiated(folder: Path) -> None:
    calibration = run(folder, replace(SETTINGS, taylor=False))
    assert not any(name.startswith("importance.") for name in load_file(calibration.files[0]))
    assert torch.equal(calibration.inputs("single_blocks.0"), run(folder.with_name("other")).inputs("single_blocks.0"))


def test_streams_are_kept_where_they_are_asked_for_and_recorded_again_where_they_are_not_there(folder: Path) -> None:
    """A calibration with streams serves conversions without stand-ins, too."""
    plain, asked = run(folder), replace(SETTINGS, streams=True)
    assert not any(name.startswith("before.") for name in load_file(plain.files[0]))
    stream = run(folder, asked).stream_change("double_blocks.0", "img")
    assert stream.before_nH.shape == stream.change_nH.shape == (int(stream.tokens_B.sum()), 128)
    times = [file.stat().st_mtime_ns for file in plain.files]
    assert [file.stat().st_mtime_ns for file in run(folder).files] == times


# Interruption


def test_an_interrupted_calibration_goes_on_and_ends_as_if_it_had_not_been(folder: Path) -> None:
    class Stop(Exception):
        pass

    losses: list[float] = []

    def stop_after_two(loss: float) -> None:
        losses.append(loss)
        if len(losses) == 2:
            raise Stop

    arguments = (DIMS, FFNS, LatentFile(folder.parent / "data.safetensors"), SETTINGS)
    with pytest.raises(Stop):
        calibrate_on_batches(
            lambda: load_transformer(folder.parent / "flux.safetensors", torch.float32),
            *arguments, folder, "flux", stop_after_two,
        )  # fmt: skip
    kept = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(kept) == ["batch-00000.safetensors", "batch-00001.safetensors"]
    resumed, whole = run(folder), run(folder.with_name("whole"))
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    for one, other in zip(resumed.files, whole.files, strict=True):
        assert one.read_bytes() == other.read_bytes()

    def not_again() -> object:
        raise AssertionError("the model was loaded though nothing is missing")

    losses.clear()
    calibrate_on_batches(not_again, *arguments, folder, "flux", losses.append)  # type: ignore[arg-type]
    assert losses == resumed.losses


def test_a_damaged_batch_is_made_again(folder: Path) -> None:
    first = run(folder)
    whole = first.files[1].read_bytes()
    first.files[1].write_bytes(whole[: len(whole) // 2])
    assert run(folder).files[1].read_bytes() == whole


def test_a_folder_of_another_calibration_is_refused(folder: Path) -> None:
    run(folder)
    with pytest.raises(UserError, match=r"holds another calibration: batch_size, seed differ.*--calibration"):
        run(folder, replace(SETTINGS, batch_size=1, seed=1))
    with pytest.raises(UserError, match="holds another calibration: teacher differ"):
        run(folder, teacher="another")


def test_a_folder_of_an_older_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files lack what later versions ask of them."""
    monkeypatch.setattr("d2m_train.conversion.calibrate._FORMAT", 1)
    run(folder)
    monkeypatch.undo()
    with pytest.raises(UserError, match="holds another calibration: format differ"):
        run(folder)


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(UserError, match=r"calibration: cannot be made .*--calibration"):
        run(folder)

"""diffusers' FLUX filled from a file, and importance measured on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2m_model.checkpoint import CheckpointError
from d2m_model.config import all_ffn_names

from .small_flux import DIMS, save_flux

pytest.importorskip("diffusers")

from d2m_model.hosts.diffusers import (
    dims_of_transformer,
    ffn_linears,
    load_transformer,
    state_dict_to_bfl,
)
from d2m_train import UserError
from d2m_train.calibration import (
    CalibrationBatch,
    EmojiData,
    FileData,
    flow_matching_loss,
    taylor_importance,
)


def velocity(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    output: torch.Tensor = model(
        hidden_states=torch.randn(1, 4, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 3, 32, generator=generator),
        pooled_projections=torch.randn(1, 48, generator=generator),
        timestep=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.rand(4, 3, generator=generator).round(),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]
    return output


def test_a_file_fills_the_model_whole_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = save_flux(tmp_path / "flux.safetensors", prefix="model.diffusion_model.")
    model = load_transformer(tmp_path / "flux.safetensors")
    assert dims_of_transformer(model) == DIMS
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    back = state_dict_to_bfl(model)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert next(load_transformer(tmp_path / "flux.safetensors", torch.float32).parameters()).dtype == torch.float32


def test_every_ffn_is_found_where_its_name_says(tmp_path: Path) -> None:
    tensors = save_flux(tmp_path / "flux.safetensors")
    found = {
        name: (up, down, first)
        for name, up, down, first in ffn_linears(load_transformer(tmp_path / "flux.safetensors"))
    }
    assert list(found) == all_ffn_names(DIMS)
    up, down, first = found["single_blocks.1"]
    assert torch.equal(up.weight, tensors["single_blocks.1.linear1.weight"][384:])
    assert torch.equal(down.weight[:, first:], tensors["single_blocks.1.linear2.weight"][:, 128:])
    up, down, first = found["double_blocks.1.txt_mlp"]
    assert torch.equal(up.weight, tensors["double_blocks.1.txt_mlp.0.weight"])
    assert torch.equal(down.weight[:, first:], tensors["double_blocks.1.txt_mlp.2.weight"])


def test_a_file_that_is_no_dense_flux_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: .*looks like a LoRA"):
        load_transformer(tmp_path / "lora.safetensors")


def save_calibration(path: Path, samples: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "latents": torch.randn(samples, 16, 4, 6, generator=generator),
        "context": torch.randn(samples, 3, 32, generator=generator),
        "pooled": torch.randn(samples, 48, generator=generator),
    }
    save_file(tensors, path)


def test_the_loss_is_that_of_flow_matching(tmp_path: Path) -> None:
    """A model that always answers noise - image has none; noise level 1 shows it noise alone, 0 the image."""
    save_calibration(tmp_path / "data.safetensors")
    (batch,) = FileData(tmp_path / "data.safetensors").batches(1, 2, seed=0)
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
    model = load_transformer(tmp_path / "flux.safetensors")
    losses: list[float] = []
    data = FileData(tmp_path / "data.safetensors")
    scores = taylor_importance(model, data, batches=3, batch_size=2, seed=0, progress=losses.append)
    assert list(scores) == all_ffn_names(DIMS)
    assert len(losses) == 3
    for ffn in ("single_blocks.0", "double_blocks.0.img_mlp"):
        assert scores[ffn][dead].max() == 0
        assert scores[ffn][dead + 1].min() > 0
    assert all(scores[ffn].isfinite().all() for ffn in scores)


def test_calibration_samples_become_patches_with_their_places(tmp_path: Path) -> None:
    save_calibration(tmp_path / "data.safetensors")
    batches: list[CalibrationBatch] = list(FileData(tmp_path / "data.safetensors").batches(2, 4, seed=0))
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
    shutil.copy(dataset.ASSETS / "autoencoder.safetensors", tmp_path)
    PromptEncoder(vocabulary()).save(tmp_path / "prompt-encoder.safetensors")
    first, second = EmojiData(tmp_path).batches(2, 3, seed=0)
    assert first.tokens_BTC.shape == (3, 64, 64)
    assert first.context_BLD.shape == (3, 12, 128)
    assert first.pooled_BV.shape == (3, 128)
    assert 0.7 < first.tokens_BTC.std() < 1.4  # FLUX's model space
    assert not torch.equal(first.tokens_BTC, second.tokens_BTC)
    again, _ = EmojiData(tmp_path).batches(2, 3, seed=0)
    assert torch.equal(first.tokens_BTC, again.tokens_BTC)

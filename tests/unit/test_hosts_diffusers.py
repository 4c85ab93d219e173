"""diffusers' FLUX filled from a file, dense or as a FLUX-MoE."""

from __future__ import annotations

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

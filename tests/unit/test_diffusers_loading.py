"""diffusers' FLUX filled from a file, dense or as a FLUX-MoE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model.checkpoint import CheckpointError
from d2m_model.config import all_ffn_names
from tests.toys.teachers import DIMS, save_flux

pytest.importorskip("diffusers")

from d2m_model.hosts.diffusers import (
    FluxMoETransformer2DModel,
    dims_of_transformer,
    ffn_linears,
    flux_moe_tensors,
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


# FLUX-MoE


def split(tmp_path: Path, *options: str, dtype: torch.dtype = torch.float32) -> Path:
    """Converted by the command line, data-free."""
    from d2m_train.__main__ import main

    save_flux(tmp_path / "flux.safetensors", dtype=dtype)
    moe = tmp_path / "moe.safetensors"
    command = ["convert", "--teacher", str(tmp_path / "flux.safetensors"), "--out", str(moe), "--overwrite"]
    assert main([*command, *options]) == 0
    return moe


def set_top_k(model: FluxMoETransformer2DModel, top_k: int) -> FluxMoETransformer2DModel:
    model.set_top_k(top_k)
    return model


@torch.no_grad()
def test_all_experts_are_the_dense_model(tmp_path: Path) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(split(tmp_path, "--split-only"))
    dense = velocity(load_transformer(tmp_path / "flux.safetensors"))
    assert len(model.moe_ffns()) == len(model.flux_moe.ffns) == 4
    torch.testing.assert_close(velocity(set_top_k(model, 12)), dense, rtol=1e-5, atol=1e-5)
    assert (velocity(set_top_k(model, 2)) - dense).norm() / dense.norm() > 0.01


@torch.no_grad()
def test_compressed_modulations_run_with_one_shared_matrix(tmp_path: Path) -> None:
    """At full rank nothing is lost, below it something is."""
    full = FluxMoETransformer2DModel.from_flux_moe(split(tmp_path, "--adaln-rank", "128"))
    dense = velocity(load_transformer(tmp_path / "flux.safetensors"))
    torch.testing.assert_close(velocity(set_top_k(full, 12)), dense, rtol=1e-4, atol=1e-4)
    assert sum("adaln_in" in name for name, _ in full.named_parameters()) == 1
    low = FluxMoETransformer2DModel.from_flux_moe(split(tmp_path))
    assert low.flux_moe.adaln_rank == 11
    found = velocity(set_top_k(low, 12))
    assert 0.001 < (found - dense).norm() / dense.norm() < 1


def test_routers_keep_the_precision_of_their_file(tmp_path: Path) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(split(tmp_path, dtype=torch.bfloat16), torch.float16)
    assert {moe.router.weight.dtype for moe in model.moe_ffns().values()} == {torch.float32}
    assert {moe.routed_up.dtype for moe in model.moe_ffns().values()} == {torch.float16}
    assert model.adaln_in is not None
    assert model.adaln_in.weight.dtype == torch.float32
    assert model.x_embedder.weight.dtype == model.transformer_blocks[0].norm1.linear.weight.dtype == torch.float16
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_dense_file_is_no_flux_moe(tmp_path: Path) -> None:
    save_flux(tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match="This is a dense FLUX, not a FLUX-MoE"):
        FluxMoETransformer2DModel.from_flux_moe(tmp_path / "flux.safetensors")


def test_a_flux_moe_comes_back_as_the_tensors_of_its_file(tmp_path: Path) -> None:
    for options in (("--split-only",), ()):
        file = split(tmp_path, *options, dtype=torch.bfloat16)
        stored, model = load_file(file), FluxMoETransformer2DModel.from_flux_moe(file)
        back = dict(flux_moe_tensors(model, model.flux_moe))
        assert back.keys() == stored.keys()
        for name, tensor in stored.items():
            assert back[name].dtype == tensor.dtype, name
            assert torch.equal(back[name], tensor), name

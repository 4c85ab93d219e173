"""BFL names <-> diffusers names."""

from __future__ import annotations

import pytest
import torch

from d2m_model.config import FluxDims
from d2m_model.keys import (
    BFL,
    DIFFUSERS,
    bfl_tensors,
    dense_shapes,
    diffusers_shapes,
    diffusers_sources,
    landmarks_of,
    strip_prefix,
    swap_halves,
)
from tests.toys.teachers import diffusers_tensors

DIMS = FluxDims(
    hidden_size=128,
    double_blocks=2,
    single_blocks=3,
    in_channels=64,
    out_channels=64,
    context_size=32,
    vector_size=48,
    guidance_embed=True,
)


def random_flux(dims: FluxDims) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in dense_shapes(dims).items()}


def test_weights_survive_the_way_to_diffusers_and_back_bit_for_bit() -> None:
    tensors = random_flux(DIMS)
    back = bfl_tensors(diffusers_tensors(tensors, DIMS), DIMS)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_model_is_filled_whole_and_gives_the_same_weights_back(guidance: bool) -> None:
    pytest.importorskip("diffusers")
    from d2m_model.hosts.diffusers import state_dict_to_bfl, untrained_transformer

    dims = FluxDims(**{f: getattr(DIMS, f) for f in DIMS.__slots__} | {"guidance_embed": guidance})
    tensors = random_flux(dims)
    model = untrained_transformer(dims)
    model.load_state_dict(diffusers_tensors(tensors, dims), strict=True)
    back = state_dict_to_bfl(model)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_names_and_shapes_of_diffusers_are_those_of_its_model() -> None:
    pytest.importorskip("diffusers")
    from d2m_model.hosts.diffusers import untrained_transformer

    with torch.device("meta"):
        model = untrained_transformer(DIMS)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert diffusers_shapes(DIMS) == theirs
    assert landmarks_of(theirs) is DIFFUSERS
    assert landmarks_of(dense_shapes(DIMS)) is BFL


def test_final_modulation_is_shift_first_in_bfl_and_scale_first_in_diffusers() -> None:
    tensors = random_flux(DIMS)
    name = "final_layer.adaLN_modulation.1.weight"
    shift, scale = tensors[name].chunk(2)
    theirs = diffusers_tensors(tensors, DIMS)["norm_out.linear.weight"]
    assert torch.equal(theirs, torch.cat([scale, shift]))
    assert torch.equal(swap_halves(theirs), tensors[name])


def test_single_block_up_projection_follows_q_k_v() -> None:
    tensors = random_flux(DIMS)
    theirs = diffusers_tensors(tensors, DIMS)
    up = theirs["single_transformer_blocks.1.proj_mlp.weight"]
    assert torch.equal(up, tensors["single_blocks.1.linear1.weight"][3 * 128 :])
    assert diffusers_sources(DIMS)["single_blocks.1.linear1.bias"].rows == (128, 128, 128, 512)


def test_prefix_and_norm_spelling_become_bfl() -> None:
    given = {
        "model.diffusion_model.img_in.weight": 1,
        "model.diffusion_model.double_blocks.0.img_attn.norm.query_norm.weight": 2,
        "vae.decoder.conv_in.weight": 3,
    }
    assert strip_prefix(given) == {"img_in.weight": 1, "double_blocks.0.img_attn.norm.query_norm.scale": 2}
    assert strip_prefix({"img_in.weight": 1}) == {"img_in.weight": 1}

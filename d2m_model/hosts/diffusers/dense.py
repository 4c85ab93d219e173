"""A dense FLUX.1 in diffusers: filled from BFL tensors and read back into them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...config import FluxDims
from ...keys import HEAD, bfl_tensors, diffusers_sources, swap_halves
from ...teacher import DenseTeacher, open_teacher

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

AXES = (16, 56, 56)  # rotary channels of (index, row, column)


def transformer_options(dims: FluxDims) -> dict[str, Any]:
    """Return the arguments that construct diffusers' FluxTransformer2DModel."""
    return {
        "patch_size": 1,
        "in_channels": dims.in_channels,
        "out_channels": dims.out_channels,
        "num_layers": dims.depths["double"],
        "num_single_layers": dims.depths["single"],
        "attention_head_dim": HEAD,
        "num_attention_heads": dims.hidden_size // HEAD,
        "joint_attention_dim": dims.context_size,
        "pooled_projection_dim": dims.vector_size,
        "guidance_embeds": dims.guidance_embed,
        "axes_dims_rope": AXES,
    }


def untrained_transformer(dims: FluxDims) -> FluxTransformer2DModel:
    """Return a FLUX.1 with these dimensions and diffusers' initial weights."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**transformer_options(dims))


def dims_of_transformer(model: FluxTransformer2DModel) -> FluxDims:
    config = model.config
    return FluxDims(
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        in_channels=config.in_channels,
        out_channels=model.out_channels,
        context_size=config.joint_attention_dim,
        vector_size=config.pooled_projection_dim,
        guidance_embed=config.guidance_embeds,
    )


def load_transformer(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> FluxTransformer2DModel:
    """Load a dense FLUX.1 in any form that open_teacher reads as diffusers' model; `dtype` None keeps the teacher's.

    Raises CheckpointError if the file is not a dense FLUX.1. No weight is in memory twice.
    """
    with open_teacher(path) as teacher:
        with torch.device("meta"):
            model = untrained_transformer(teacher.dims)
        _fill(model, teacher, dtype, device)
    return model.eval()


def _fill(
    model: FluxTransformer2DModel, teacher: DenseTeacher, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    for name, source in diffusers_sources(teacher.dims).items():
        whole = teacher.tensor(name)
        if source.swap:
            whole = swap_halves(whole)
        for part, rows in zip(source.names, whole.split(source.rows), strict=True):
            module, _, parameter = part.rpartition(".")
            value = torch.empty(rows.shape, dtype=dtype or rows.dtype, device=device).copy_(rows)
            setattr(model.get_submodule(module), parameter, nn.Parameter(value))


def state_dict_to_bfl(model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """Return every tensor of a dense FLUX.1 in BFL names, in the order of dense_shapes."""
    return bfl_tensors(model.state_dict(), dims_of_transformer(model))


def ffn_linears(model: FluxTransformer2DModel) -> Iterator[tuple[str, nn.Linear, nn.Linear, int]]:
    """Yield BFL name, up-projection, down-projection and the first column of its neurons in `down`, per FFN."""
    for ffn in dims_of_transformer(model).ffns:
        up, down = (model.get_submodule(name) for name in ffn.diffusers_linears)
        yield ffn.name, up, down, model.inner_dim if ffn.stream == "joint" else 0

"""A dense FLUX.1 small enough for unit tests, as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2m_model.config import FluxDims
from d2m_model.keys import diffusers_sources, swap_halves
from tests.toys import files

DIMS = replace(files.DIMS, single_blocks=2, context_size=32, vector_size=48)
METADATA = {"modelspec.title": "Small FLUX", "modelspec.license": "Apache-2.0"}


def dense_flux(dims: FluxDims = DIMS, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in BFL names."""
    return {name: tensor.to(dtype) for name, tensor in files.dense_flux(dims, seed).items()}


def save_flux(path: Path, *, prefix: str = "", dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write a dense FLUX and return its tensors, by BFL name."""
    tensors = dense_flux(dtype=dtype)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata=METADATA)
    return tensors


def diffusers_tensors(tensors: Mapping[str, Tensor], dims: FluxDims) -> dict[str, Tensor]:
    """Rename and split BFL tensors into those of diffusers' FluxTransformer2DModel."""
    result: dict[str, Tensor] = {}
    for name, source in diffusers_sources(dims).items():
        tensor = swap_halves(tensors[name]) if source.swap else tensors[name]
        result |= dict(zip(source.names, tensor.split(source.rows), strict=True))
    return result


def ask(model: nn.Module, dims: FluxDims = DIMS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The answer of a diffusers FLUX to one sample, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        output: Tensor = model(
            hidden_states=torch.randn(1, 4, dims.in_channels, generator=generator).to(dtype),
            encoder_hidden_states=torch.randn(1, 3, dims.context_size, generator=generator).to(dtype),
            pooled_projections=torch.randn(1, dims.vector_size, generator=generator).to(dtype),
            timestep=torch.tensor([0.7], dtype=dtype),
            guidance=torch.tensor([3.5], dtype=dtype),
            img_ids=torch.rand(4, 3, generator=generator).round(),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]
    return output

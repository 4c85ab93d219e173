"""A dense FLUX.1 small enough for unit tests, as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from d2m_model.config import FluxDims
from d2m_model.keys import dense_shapes, diffusers_sources, swap_halves

DIMS = FluxDims(
    hidden_size=128,
    double_blocks=2,
    single_blocks=2,
    in_channels=64,
    out_channels=64,
    context_size=32,
    vector_size=48,
    guidance_embed=True,
)
METADATA = {"modelspec.title": "Small FLUX", "modelspec.license": "Apache-2.0"}


def dense_flux(dims: FluxDims = DIMS, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in BFL names, large enough for every part to count in the output."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in dense_shapes(dims).items():
        gain = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        tensor = torch.randn(shape, generator=generator) * gain + name.endswith("scale")
        tensors[name] = tensor.to(dtype)
    return tensors


def save_flux(path: Path, *, prefix: str = "", dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Write a dense FLUX and give its tensors, by BFL name."""
    tensors = dense_flux(dtype=dtype)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata=METADATA)
    return tensors


def diffusers_tensors(tensors: Mapping[str, torch.Tensor], dims: FluxDims) -> dict[str, torch.Tensor]:
    """Rename and split BFL tensors into those of diffusers' FluxTransformer2DModel."""
    result: dict[str, torch.Tensor] = {}
    for name, source in diffusers_sources(dims).items():
        tensor = swap_halves(tensors[name]) if source.swap else tensors[name]
        result |= dict(zip(source.names, tensor.split(source.rows), strict=True))
    return result

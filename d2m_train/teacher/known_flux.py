"""Dimensions of the FLUX.1 models that a run may name without having their file."""

from __future__ import annotations

from dataclasses import replace

from d2m_model.config import FluxDims

from ..run_config import KnownFlux

FLUX_DEV = FluxDims(
    hidden_size=3072,
    double_blocks=19,
    single_blocks=38,
    in_channels=64,
    out_channels=64,
    context_size=4096,
    vector_size=768,
    guidance_embed=True,
)
EMOJI_FLUX = FluxDims(
    hidden_size=128,
    double_blocks=7,
    single_blocks=14,
    in_channels=64,
    out_channels=64,
    context_size=128,
    vector_size=128,
    guidance_embed=True,
)
KNOWN_DIMS: dict[KnownFlux, FluxDims] = {
    "flux1-dev": FLUX_DEV,
    "flux1-schnell": replace(FLUX_DEV, guidance_embed=False),
    "flux1-lite": FLUX_DEV.with_depths(double=8, single=FLUX_DEV.depths["single"]),
    "flux1-mini": FLUX_DEV.with_depths(double=5, single=10),
    "emoji": EMOJI_FLUX,
}

"""FLUX.1 in diffusers: filled from BFL tensors and read back into them, dense or as a FLUX-MoE.

Importing this package does not import diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .dense import (
    AXES,
    dims_of_transformer,
    ffn_linears,
    load_transformer,
    state_dict_to_bfl,
    untrained_transformer,
)
from .tensors import flux_moe_specs, flux_moe_tensors, save_flux_moe

if TYPE_CHECKING:
    from .transformer import FluxMoETransformer2DModel

__all__ = [
    "AXES",
    "FluxMoETransformer2DModel",
    "dims_of_transformer",
    "ffn_linears",
    "flux_moe_specs",
    "flux_moe_tensors",
    "load_transformer",
    "save_flux_moe",
    "state_dict_to_bfl",
    "untrained_transformer",
]


def __getattr__(name: str) -> Any:
    if name == "FluxMoETransformer2DModel":  # its base class is diffusers'
        from .transformer import FluxMoETransformer2DModel

        return FluxMoETransformer2DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

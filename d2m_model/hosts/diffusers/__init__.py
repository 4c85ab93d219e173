"""FLUX.1 in diffusers: filled from and read back into BFL tensors, dense or as a FLUX-MoE.

Importing this package needs no diffusers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from ...config import FluxMoEConfig
from ...moe import MoEFFN
from .dense import (
    AXES,
    dims_of_transformer,
    ffn_linears,
    load_transformer,
    new_transformer,
    state_dict_to_bfl,
)
from .tensors import flux_moe_specs, flux_moe_tensors, save_flux_moe, state_dict_of_flux_moe

if TYPE_CHECKING:
    from .transformer import FluxMoETransformer2DModel

__all__ = [
    "AXES",
    "FluxMoETransformer2DModel",
    "dims_of_transformer",
    "experts_of",
    "ffn_linears",
    "flux_moe_specs",
    "flux_moe_tensors",
    "load_flux_moe",
    "load_transformer",
    "new_transformer",
    "save_flux_moe",
    "state_dict_of_flux_moe",
    "state_dict_to_bfl",
]


def __getattr__(name: str) -> Any:
    if name == "FluxMoETransformer2DModel":  # its base class is diffusers'
        from .transformer import FluxMoETransformer2DModel

        return FluxMoETransformer2DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_flux_moe(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[FluxMoETransformer2DModel, FluxMoEConfig]:
    """FluxMoETransformer2DModel.from_flux_moe, and the configuration."""
    from .transformer import FluxMoETransformer2DModel

    model = FluxMoETransformer2DModel.from_flux_moe(path, dtype, device)
    return model, model.flux_moe


def experts_of(model: FluxMoETransformer2DModel) -> list[MoEFFN]:
    """The routed FFNs; set `top_k` and `gate` on them."""
    return list(model.moe_ffns().values())

"""Load FLUX-MoE."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..d2m_model.checkpoint import check_file

WEIGHT_DTYPES = {"default": None, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class LoadFluxMoE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D2MLoadFluxMoE",
            display_name="Load FLUX-MoE",
            category="FLUX-MoE",
            description=(
                "Loads a FLUX-MoE file (a FLUX.1 turned into a Mixture of Experts) and checks it whole. "
                "ComfyUI's own Load Diffusion Model opens the same files; this node says more when one is not right."
            ),
            search_aliases=["flux moe", "dense2moe", "mixture of experts", "load flux", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A FLUX-MoE file in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="How the weights are held in memory. fp8 halves them at some loss; routers keep their precision.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        check_file(path)
        dtype = WEIGHT_DTYPES[weight_dtype]
        model_options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        return io.NodeOutput(comfy.sd.load_diffusion_model(path, model_options=model_options))

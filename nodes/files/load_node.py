"""The node Load FLUX-MoE.

The file is mapped, not read, unless ComfyUI runs with --disable-mmap: a weight is read from disk when it is first used,
and there is no copy of it if the model runs in the file's own dtype. On the CPU it always does (computing in float32), so
that a file can be as large as the memory. With dynamic VRAM, ComfyUI's own loader maps files too, and handles more kinds
of them.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ...d2m_model.checkpoint import CONFIG_KEY, CheckpointError, check_file, check_opened
from ...d2m_model.quantised import HEADER_KEY, quantised_layers
from ...d2m_model.tensor_file import FileState, TensorFile
from ..cost import remember_model

_WEIGHT_DTYPES = {"default": None, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def load_flux_moe(path: str, model_options: dict[str, Any] = {}, disable_dynamic: bool = False) -> Any:  # noqa: B006
    """Load a FLUX-MoE file as comfy.sd.load_diffusion_model does. Raises CheckpointError if it is damaged or not one."""
    if comfy.memory_management.aimdo_enabled:
        check_file(path)
        return comfy.sd.load_diffusion_model(path, model_options, disable_dynamic)
    file = TensorFile(path, copy_on_write=True)  # hooks patch weights in place
    check_opened(file)
    mapped = not args.disable_mmap
    tensors = {name: file.tensor(name) if mapped else file.tensor(name).clone() for name in file.shapes}
    metadata, layers = dict(file.metadata), quantised_layers(file.metadata)
    metadata.pop(HEADER_KEY, None)  # one without layers is an error to ComfyUI
    if layers:
        metadata[HEADER_KEY] = json.dumps({"layers": layers})
    options = dict(model_options)
    quantised = layers or "scaled_fp8" in tensors or any(name.endswith(".comfy_quant") for name in tensors)
    device = options.get("load_device", comfy.model_management.get_torch_device())
    if not quantised and comfy.model_management.is_device_cpu(device):
        options.setdefault("dtype", comfy.utils.weight_dtype(tensors))
    try:
        model = comfy.sd.load_diffusion_model_state_dict(tensors, options, metadata, disable_dynamic)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if not quantised or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: this ComfyUI cannot read how the file is quantised ({type(error).__name__}: {error}). "
            "Update ComfyUI, or take the file in float8 or bfloat16."
        ) from error
    model.model.source_file = (path, file.state) if mapped else None
    model.cached_patcher_init = (load_flux_moe, (path, model_options))  # with which ComfyUI loads it again
    return model


def model_names() -> list[str]:
    """Return the names of files in diffusion_models, FLUX-MoEs first."""
    names: list[str] = folder_paths.get_filename_list("diffusion_models")
    return sorted(names, key=lambda name: not _is_flux_moe(folder_paths.get_full_path("diffusion_models", name)))


def _is_flux_moe(path: str | None) -> bool:
    try:
        return (
            path is not None
            and path.endswith((".safetensors", ".sft"))
            and _has_config(path, os.stat(path).st_mtime_ns)
        )
    except OSError:
        return False


@lru_cache(maxsize=4096)
def _has_config(path: str, changed: int) -> bool:
    """Return whether a file has a FLUX-MoE's configuration. Reads its header, again if the file was changed."""
    try:
        with TensorFile(path) as file:
            return CONFIG_KEY in file.shapes
    except CheckpointError:
        return False


class LoadFluxMoE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D2MLoadFluxMoE",
            display_name="Load FLUX-MoE",
            category="FLUX-MoE",
            description=(
                "Loads a FLUX-MoE file (a FLUX.1 turned into a Mixture of Experts) and checks it whole. The file is mapped: "
                "it may be as large as the memory. ComfyUI's own Load Diffusion Model opens the same files; this node says "
                "more when one is not right."
            ),
            search_aliases=["flux moe", "dense2moe", "mixture of experts", "load flux", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="A file in models/diffusion_models. FLUX-MoE files come first; others are not opened by this node.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(_WEIGHT_DTYPES),
                    default="default",
                    tooltip="How the weights are held in memory. fp8 halves them at some loss; routers keep their precision.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The FLUX-MoE.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **inputs: Any) -> Any:
        """Load again if the file has changed."""
        path = folder_paths.get_full_path("diffusion_models", model_name)
        return None if path is None else FileState.of(path)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        dtype = _WEIGHT_DTYPES[weight_dtype]
        model = load_flux_moe(path, {} if dtype is None else {"dtype": dtype})
        remember_model(model.model.moe_config)
        return io.NodeOutput(model)

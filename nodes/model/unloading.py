"""Weights of a MODEL as they are without patches, and with its own."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher


def unload_patches(patcher: Any) -> None:
    """Take the patches of this MODEL, and of others that share its weights, out of them. Sampling loads it again."""
    management = comfy.model_management
    others = [it for it in management.current_loaded_models if it.model is None or not patcher.is_clone(it.model)]
    management.free_memory(1e30, patcher.load_device, keep_loaded=others)
    if patcher.backup or patcher.object_patches_backup:  # loaded without ComfyUI's memory management
        patcher.detach()


def restore_transformer(model: Any) -> None:
    """Unload a comfy BaseModel if a MODEL of it is loaded with other modules in place of the transformer or its parts.

    Nodes exchange them as object patches (compiling nodes the transformer), and the names of the weights with them.
    """
    for patcher in comfy.model_management.loaded_models():
        if patcher.model is model and has_replaced_modules(patcher):
            unload_patches(patcher)


def has_replaced_modules(patcher: Any) -> bool:
    """Return whether object patches of this MODEL, or of a clone of it, are in its transformer at present."""
    return any(name.split(".")[0] == "diffusion_model" for name in patcher.object_patches_backup)


def patched_weight(patcher: Any, key: str) -> Any:
    """Return a weight with the patches of this MODEL, as ComfyUI would use it, and leave the MODEL as it is.

    Packs have patchers of their own, whose method may only be able to change the MODEL.
    """
    patch = patcher.patch_weight_to_device
    if "return_weight" in inspect.signature(patch).parameters:
        return patch(key, device_to=patcher.load_device, return_weight=True)
    return ModelPatcher.patch_weight_to_device(patcher, key, device_to=patcher.load_device, return_weight=True)

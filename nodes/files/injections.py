"""Changes to a MODEL that are not in its weights, and so would not be in a file: they are refused, or named."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from comfy.ldm.flux.model import Flux

from ...d2m_model.blocks import Block
from ..model.unloading import has_replaced_modules, unload_patches

_BYPASS = "bypass_lora"  # ComfyUI's name for the injection of Load LoRA (Bypass)
_MOST_NAMES = 3  # in a message


def refuse_injections(model: Any, node: str) -> None:
    """Raise ValueError if something changes the layers while they run, instead of their weights."""
    if model.injections.get(_BYPASS):
        raise ValueError(
            f"{node}: this MODEL has a LoRA that does not change its weights (Load LoRA (Bypass)), so it would be "
            "lost. Use Load LoRA, which adds it to the weights."
        )
    kinds = {"injections": model.injections, "weight wrappers": model.weight_wrapper_patches}
    for kind, found in kinds.items():
        if names := sorted(str(name) for name, entries in found.items() if entries):
            raise ValueError(
                f"{node}: a node before this one changes the layers of this MODEL while they run ({kind}: "
                f"{', '.join(names[:_MOST_NAMES])}), which is not part of the weights and would be lost. Put that node after "
                "this one, or leave it out."
            )


def require_flux(model: Any, node: str) -> None:
    """Raise ValueError if another module stands in for the transformer of this MODEL, which is a FLUX.

    Modules that stand in for it or its parts while a MODEL is loaded (object patches, as of compiling nodes) are taken out.
    """
    if has_replaced_modules(model):
        unload_patches(model)
    replacement = type(model.model.diffusion_model)
    if not issubclass(replacement, Flux):
        raise ValueError(
            f"{node}: the transformer of this MODEL was replaced by a {replacement.__qualname__} (of "
            f"{replacement.__module__}). Put the node that does so after this one, and load the model anew (Edit > Unload "
            "Models and Execution Cache)."
        )


def warn_of_foreign(names: Iterable[str], node: str) -> None:
    """Log which modules `node` leaves out, by the names of their tensors in the transformer."""
    modules = dict.fromkeys(_module_of(name) for name in sorted(names))
    if modules:
        logging.warning(
            f"FLUX-MoE: {node} leaves out {', '.join(modules)}, which other nodes have added to this MODEL: no part of a "
            "FLUX.1."
        )


def _module_of(tensor: str) -> str:
    """Return the name of the outermost module that a tensor of another pack belongs to."""
    depth = 3 if Block.parse(tensor) is not None else 1
    return ".".join(tensor.split(".")[:depth])

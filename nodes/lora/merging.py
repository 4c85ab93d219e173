"""Merging of models (ModelMergeSimple and its kin) where one of them is a FLUX-MoE.

ComfyUI merges tensor by tensor, by name. That is right for weights in the same order only: neurons of an FFN in the order
of neuron_order, and columns of a compressed modulation in the directions of U. ComfyUI does not know of either, and the
merged model would paint noise. So weights that are handed out carry what their order depends on, and are compared with
the weights that they are merged into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...d2m_model.checkpoint import CONFIG_KEY
from ..model.call_arguments import CallArguments
from ..model.flux_moe import TRANSFORMER_PREFIX, FluxMoEModel, transformer_in

_CONFIG = TRANSFORMER_PREFIX + CONFIG_KEY
_MODEL_AS_LORA = "model_as_lora"  # ComfyUI's kind of patch for a whole model that a hook merges


class OrderedWeight(list):
    """A value of ModelPatcher.get_key_patches, with the tensor that the order of the weight depends on."""

    order: Tensor


def basis_order(model: Any, weight: str) -> tuple[str, Tensor] | None:
    """Return name and value of the tensor that the order of a MODEL's weight depends on; None if it has no order."""
    flux = transformer_in(model.diffusion_model) if isinstance(model, FluxMoEModel) else None
    name = None if flux is None else flux.ordered_by.get(weight.removeprefix(TRANSFORMER_PREFIX))
    return None if name is None else (TRANSFORMER_PREFIX + name, comfy.utils.get_attr(flux, name))


def _refuse(name: str, partner: str) -> None:
    raise ValueError(
        f"These models cannot be merged: {name} is a weight of a FLUX-MoE, whose neurons or directions have an order of "
        f"their own, and {partner}. Merge the dense models before they are converted, or FLUX-MoEs that were made from the "
        "same file by training or LoRAs."
    )


def check_partners(model: Any, patches: Mapping[Any, Any]) -> None:
    """Raise ValueError for weights that are merged into those of `model` but have another order."""
    for target, patch in patches.items():
        hooked = _is_hooked_model(patch)
        if not isinstance(patch, list) and not hooked:
            continue
        name = target if isinstance(target, str) else target[0]
        own = basis_order(model, name)
        order = patch.order if isinstance(patch, OrderedWeight) else None
        if own is not None and hooked and own[0] in patches:
            order = patches[own[0]][1][0]
        moe_on_dense = own is None and hooked and not isinstance(model, FluxMoEModel) and _CONFIG in patches
        if (own is None) != (order is None) or moe_on_dense:
            _refuse(name, "the other model is dense")
        elif own is not None and order is not None and not torch.equal(own[1].cpu(), order.cpu()):
            _refuse(name, "the other model comes of another conversion, with another order")


def _is_hooked_model(patch: Any) -> bool:
    return isinstance(patch, tuple) and patch[0] == _MODEL_AS_LORA


# Wrappers of ComfyUI's methods


def wrap_get_key_patches(original: Callable[..., dict]) -> Callable[..., dict]:
    """Wrap ModelPatcher.get_key_patches: of a FLUX-MoE only weights are handed out, with what their order depends on."""

    @functools.wraps(original)
    def get_key_patches(self: Any, *args: Any, **kwargs: Any) -> dict:
        patches = original(self, *args, **kwargs)
        if isinstance(self.model, FluxMoEModel):
            weights = {name for name, _ in self.model.named_parameters()}
            patches = {name: patch for name, patch in patches.items() if name in weights}
            for name in patches:
                if (order := basis_order(self.model, name)) is not None:
                    patches[name] = OrderedWeight(patches[name])
                    patches[name].order = order[1]
        return patches

    return get_key_patches


def wrap_add_patches(original: Callable[..., Any], index: int) -> Callable[..., Any]:
    """Wrap a method of ModelPatcher that adds patches, its argument number `index`: refuse merging in another order."""

    @functools.wraps(original)
    def add_patches(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = CallArguments(args, kwargs)
        patches = call.find(index, "patches")
        if call.find(index + 1, "strength_patch") != 0:
            check_partners(self.model, patches)
        if isinstance(self.model, FluxMoEModel) and any(map(_is_hooked_model, patches.values())):
            weights = {name for name, _ in self.model.named_parameters()}
            kept = {name: patch for name, patch in patches.items() if name in weights}
            call = call.replace(index, "patches", kept)
        return original(self, *call.args, **call.kwargs)

    return add_patches


def register() -> None:
    """Wrap ComfyUI's methods, unless they are wrapped already."""
    wraps: dict[str, Callable[[Callable], Callable]] = {
        "get_key_patches": wrap_get_key_patches,
        "add_patches": functools.partial(wrap_add_patches, index=0),
        "add_hook_patches": functools.partial(wrap_add_patches, index=1),
    }
    for name, wrap in wraps.items():
        method: Any = getattr(ModelPatcher, name)
        if not getattr(method, "knows_moe", False):
            wrapped: Any = wrap(method)
            wrapped.knows_moe = True
            setattr(ModelPatcher, name, wrapped)

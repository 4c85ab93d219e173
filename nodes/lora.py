"""LoRAs on a model whose neurons are reordered.

Names and shapes of a FLUX-MoE's weights are dense FLUX's, so ComfyUI's own key map and loaders fit. What they
do not know is the order of the neurons. Every patch that `comfy.lora.load_lora` makes for a reordered tensor is
wrapped in `PermutedPatch`, which puts the weight into the teacher's order, lets ComfyUI apply the patch, whatever
its kind, and puts the result back. It goes through all of ComfyUI's own paths (patched on loading, patched on
the fly in low VRAM, prefetched), since it is a weight adapter like the others.

How load_lora, which knows no model, learns of the order: the values of the key map are tensor names, and for our
models they are `MoEKey`s, strings that also lead to the model's neuron orders.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import comfy.lora
import comfy.sd
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..d2m_model.layout import inverse_order, permute_neurons
from .flux_moe import FluxMoEModel

Neurons = dict[str, tuple[int, int, Tensor]]  # tensor name -> (axis, first neuron, neuron_order)


class MoEKey(str):
    """The name of a tensor of a FLUX-MoE."""

    __slots__ = ("neurons",)
    neurons: Neurons  # of the whole model


class PermutedPatch(WeightAdapterBase):
    """A patch made for the teacher's order of neurons, on a weight that has them in another.

    weights is (axis, first, neuron_order, patch): ComfyUI rebuilds adapters from `loaded_keys` and `weights`.
    `patch` is anything that comfy.lora.calculate_weight takes: another adapter, or a tuple like ("diff", ...).
    """

    name = "permuted"

    def __init__(self, loaded_keys: set[str], weights: tuple[int, int, Tensor, Any]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_shape(self, key: str) -> Any:
        patch = self.weights[3]
        return patch.calculate_shape(key) if isinstance(patch, WeightAdapterBase) else None

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,  # ComfyUI has applied it
        offset: tuple[int, int, int] | None,  # and narrowed the weight by this
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        axis, first, order, patch = self.weights
        if offset is not None and offset[0] == axis:
            first -= offset[1]
        dense = permute_neurons(weight, axis, first, inverse_order(order))
        dense = comfy.lora.calculate_weight(
            [(strength, patch, 1.0, None, function)], dense, key, intermediate_dtype, original_weights=original_weight
        )
        patched = permute_neurons(dense, axis, first, order)
        # A slice has to be changed in place; a weight that a patch made larger cannot be.
        return weight.copy_(patched) if patched.shape == weight.shape else patched


def key_map_of_moe(original: Callable[..., dict]) -> Callable[..., dict]:
    """comfy.lora.model_lora_keys_unet, whose values for our models are MoEKeys."""

    @functools.wraps(original)
    def model_lora_keys_unet(model: Any, *args: Any, **kwargs: Any) -> dict:
        key_map = original(model, *args, **kwargs)
        if isinstance(model, FluxMoEModel):
            prefix = "diffusion_model."
            neurons = {f"{prefix}{name}": place for name, place in model.diffusion_model.neurons().items()}
            for lora_key, target in key_map.items():
                name, *narrowed = (target,) if isinstance(target, str) else target
                if name.startswith(prefix):
                    name = MoEKey(name)
                    name.neurons = neurons
                    key_map[lora_key] = (name, *narrowed) if narrowed else name
        return key_map

    return model_lora_keys_unet


def load_lora_of_moe(original: Callable[..., dict]) -> Callable[..., dict]:
    """comfy.lora.load_lora, whose patches of reordered tensors are PermutedPatches."""

    @functools.wraps(original)
    def load_lora(lora: Any, to_load: dict, *args: Any, **kwargs: Any) -> dict:
        patches = original(lora, to_load, *args, **kwargs)
        names = (target if isinstance(target, str) else target[0] for target in to_load.values())
        neurons = next((name.neurons for name in names if isinstance(name, MoEKey)), {})
        return {target: permuted(target, patch, neurons) for target, patch in patches.items()}

    return load_lora


def permuted(target: Any, patch: Any, neurons: Neurons) -> Any:
    """`patch` as it must be for `target` of the key map: a name, or (name, (axis, start, length)[, function])."""
    name, offset = (target, None) if isinstance(target, str) else target[:2]
    if name not in neurons:
        return patch
    axis, first, order = neurons[name]
    if offset is not None and offset[0] == axis:
        start, end = offset[1], offset[1] + offset[2]
        if end <= first or start >= first + order.numel():
            return patch  # of qkv, say
        if start > first or end < first + order.numel():
            raise ValueError(
                f"A LoRA changes rows {start} to {end} of {name}, a part of the FFN whose neurons are rows {first} to "
                f"{first + order.numel()}; in a FLUX-MoE they are reordered, so only all of them can be changed."
            )
    return PermutedPatch(getattr(patch, "loaded_keys", set()), (axis, first, order, patch))


def bypass_of_moe(original: Callable[..., Any]) -> Callable[..., Any]:
    """comfy.sd.load_bypass_lora_for_models, which adds a LoRA's output to a module's: routed experts have no such
    module, so on our models the LoRA goes into the weights instead."""

    @functools.wraps(original)
    def load_bypass_lora_for_models(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is not None and isinstance(model.model, FluxMoEModel):
            logging.info("FLUX-MoE: the LoRA is patched into the weights; bypass mode does not reach routed experts.")
            return comfy.sd.load_lora_for_models(model, *args, **kwargs)
        return original(model, *args, **kwargs)

    return load_bypass_lora_for_models


def register() -> None:
    """Wrap ComfyUI's functions. Again is harmless."""
    wraps: list[tuple[Any, str, Callable]] = [
        (comfy.lora, "model_lora_keys_unet", key_map_of_moe),
        (comfy.lora, "load_lora", load_lora_of_moe),
        (comfy.sd, "load_bypass_lora_for_models", bypass_of_moe),
    ]
    for module, name, wrap in wraps:
        function = getattr(module, name)
        if not getattr(function, "knows_moe", False):
            wrapped = wrap(function)
            wrapped.knows_moe = True
            setattr(module, name, wrapped)

"""LoRAs on a FLUX-MoE.

Names and shapes of a FLUX-MoE's weights are dense FLUX's, so ComfyUI's own key map and loaders fit. What they do not
know is the order of the neurons, and what became of the modulations in a file with AdaLN compression. For such
tensors every patch that `comfy.lora.load_lora` makes gives way to one that does (patches.py,
modulations.py); the others stay as they are.

How load_lora, which knows no model, learns of it: the values of the key map are tensor names, and for our models they
are `MoEKey`s, strings that also lead to what a LoRA has to be told.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
from torch import Tensor

from ...d2m_model.blocks import Block
from ..model.flux_moe import TRANSFORMER_PREFIX, FluxMoEModel
from .modulations import ModulationMap
from .patches import PermutedPatch
from .shapes import Shape, fits, shape_of_change, spelled

TEXT_ENCODERS = ("lora_te", "lora_prior_te", "text_encoder", "clip_", "t5xxl")  # a LoRA's keys that are not for us

Offset = tuple[int, int, int]  # axis, start, length


class MoEWeights:
    """What a LoRA has to be told of a FLUX-MoE's weights, by their names in the MODEL."""

    def __init__(self, model: FluxMoEModel) -> None:
        flux = model.diffusion_model
        self.model = model
        self.shapes: dict[str, Shape] = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        # Behind U: the shapes of the dense weights that they stand for.
        self.compressed = {
            name: (self.shapes[name][0], flux.hidden_size)
            for name in map(TRANSFORMER_PREFIX.__add__, flux.compressed())
        }
        # (axis, first neuron, neuron_order)
        self.neurons: dict[str, tuple[int, int, Tensor]] = {
            TRANSFORMER_PREFIX + name: at for name, at in flux.neurons().items()
        }

    def weight(self, name: str) -> Tensor:
        """As in the file, also while the model is loaded with other patches."""
        for patcher in comfy.model_management.loaded_models():
            if patcher.model is self.model and name in patcher.backup:
                return patcher.backup[name].weight
        return comfy.utils.get_attr(self.model, name)


class MoEKey(str):
    """The name of a tensor of a FLUX-MoE."""

    __slots__ = ("weights",)
    weights: MoEWeights  # of the whole model


# Patches


def patches_for_moe(patches: dict, weights: MoEWeights) -> dict:
    """Patches of comfy.lora.load_lora as a FLUX-MoE needs them.

    Raises ValueError for a LoRA of another model: blocks are of one shape in every FLUX.1 of a size. What fits none
    of the other tensors (img_in, say, which differs between FLUX.1's variants) is left out with a warning.
    """
    found: dict[Any, Any] = {}
    misfits: list[tuple[str, str]] = []
    modulations: ModulationMap | None = None
    for target, patch in patches.items():
        name, offset = (target, None) if isinstance(target, str) else target[:2]
        change = shape_of_change(patch)
        shape, dense = narrowed(weights.shapes.get(name), offset), narrowed(weights.compressed.get(name), offset)
        if dense is not None and (change is None or fits(change, dense)):
            if modulations is None:
                modulations = ModulationMap(weights.weight(f"{TRANSFORMER_PREFIX}adaln_in.weight"))
            found[target] = modulations.map(patch, name, weights.weight)
        elif change is not None and shape is not None and not fits(change, shape):
            tensor = name.removeprefix(TRANSFORMER_PREFIX)
            what = f"{tensor} is {spelled(dense or shape)} here and {spelled(change)} in the LoRA"
            misfits.append((name, what))
        elif name in weights.neurons:
            found[target] = permuted(patch, name, offset, *weights.neurons[name])
        else:
            found[target] = patch
    for name, what in misfits:
        if Block.parse(name.removeprefix(TRANSFORMER_PREFIX)) is not None:
            raise ValueError(
                f"This LoRA was made for another model than FLUX.1, or for a FLUX.1 of another size: {what} "
                f"({len(misfits)} of its {len(patches)} changes do not fit). Nothing of it was applied."
            )
    for _, what in misfits:
        logging.warning(f"FLUX-MoE: a part of this LoRA does not fit and is left out: {what}.")
    if modulations is not None:
        modulations.report()
    return found


def narrowed(shape: Shape | None, offset: Offset | None) -> Shape | None:
    if shape is None or offset is None:
        return shape
    axis, _, length = offset
    return (*shape[:axis], length, *shape[axis + 1 :])


def permuted(patch: Any, name: str, offset: Offset | None, axis: int, first: int, order: Tensor) -> Any:
    """`patch` of the teacher's neurons as it must be for the tensor `name`, narrowed by `offset`."""
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


def warn_of_a_stranger(keys: Iterable[str], patches: dict, weights: MoEWeights) -> None:
    """ComfyUI names every key that it did not load; of a LoRA that has nothing for the model, say so in one line."""
    if any((target if isinstance(target, str) else target[0]) in weights.shapes for target in patches):
        return
    strange = [key for key in keys if not key.startswith(TEXT_ENCODERS)]
    if strange:
        logging.warning(
            f"FLUX-MoE: this LoRA has nothing for FLUX.1: none of its {len(strange)} tensors ({strange[0]}, …) has a "
            "name that FLUX.1's LoRAs have. The model is unchanged."
        )


# ComfyUI's functions


def key_map_of_moe(original: Callable[..., dict]) -> Callable[..., dict]:
    """comfy.lora.model_lora_keys_unet, whose values for our models are MoEKeys."""

    @functools.wraps(original)
    def model_lora_keys_unet(model: Any, key_map: dict | None = None) -> dict:
        # ComfyUI's own default is one dict for all calls, which would take our keys to the next model.
        key_map = original(model, {} if key_map is None else key_map)
        if isinstance(model, FluxMoEModel):
            weights = MoEWeights(model)
            for lora_key, target in key_map.items():
                name, *rest = (target,) if isinstance(target, str) else target
                if name.startswith(TRANSFORMER_PREFIX):
                    name = MoEKey(name)
                    name.weights = weights
                    key_map[lora_key] = (name, *rest) if rest else name
        return key_map

    return model_lora_keys_unet


def load_lora_of_moe(original: Callable[..., dict]) -> Callable[..., dict]:
    """comfy.lora.load_lora, whose patches for our models fit them."""

    @functools.wraps(original)
    def load_lora(lora: Any, to_load: dict, *args: Any, **kwargs: Any) -> dict:
        patches = original(lora, to_load, *args, **kwargs)
        names = (target if isinstance(target, str) else target[0] for target in to_load.values())
        weights = next((name.weights for name in names if isinstance(name, MoEKey)), None)
        if weights is None:
            return patches
        warn_of_a_stranger(lora, patches, weights)
        return patches_for_moe(patches, weights)

    return load_lora


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

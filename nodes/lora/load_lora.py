"""LoRAs on a FLUX-MoE.

The weights of a FLUX-MoE have the names and shapes of a dense FLUX, so ComfyUI's own key map and loaders fit. They do
not know the order of the neurons, nor what became of the modulations in a file with AdaLN compression. For such
tensors every patch from `comfy.lora.load_lora` is replaced by one that knows (patches.py, modulations.py); other
patches stay as they are.

load_lora is not told the model. It learns of it through the key map, whose values are tensor names: for a FLUX-MoE
they are `MoEKey`s, strings that also lead to the facts that a LoRA needs.
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
from ...d2m_model.foreign import printable
from ..model.flux_moe import TRANSFORMER_PREFIX, FluxMoE, FluxMoEModel
from ..model.unloading import restore_transformer
from .modulations import ModulationMap
from .patches import PermutedPatch
from .shapes import WeightShape, fits, format_shape, shape_of_change

# How keys of a LoRA begin that are for text encoders
_TEXT_ENCODERS = ("lora_te", "lora_prior_te", "text_encoder", "clip_", "t5xxl")

Offset = tuple[int, int, int]  # axis, start, length


class MoEWeights:
    """Facts that a LoRA needs of a FLUX-MoE's weights, by their names in the MODEL."""

    def __init__(self, model: FluxMoEModel) -> None:
        flux = model.diffusion_model
        if not isinstance(flux, FluxMoE):
            replacement = type(model.diffusion_model)
            raise ValueError(
                f"This LoRA cannot be loaded: the transformer of this FLUX-MoE was replaced by a "
                f"{replacement.__qualname__} (of {replacement.__module__}). Put the node that does so after the LoRA."
            )
        self.model = model
        self.shapes: dict[str, WeightShape] = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        # Shapes of the dense weights that compressed modulations stand for
        self.compressed = {
            name: (self.shapes[name][0], flux.hidden_size)
            for name in map(TRANSFORMER_PREFIX.__add__, flux.compressed())
        }
        # (axis, first neuron, neuron_order)
        self.neurons: dict[str, tuple[int, int, Tensor]] = {
            TRANSFORMER_PREFIX + name: place for name, place in flux.neurons().items()
        }

    def weight(self, name: str) -> Tensor:
        """Return a weight as it is in the file, even while the model is loaded with patches."""
        for patcher in comfy.model_management.loaded_models():
            if patcher.model is self.model and name in patcher.backup:
                return patcher.backup[name].weight
        return comfy.utils.get_attr(self.model, name)


class MoEKey(str):
    """The name of a tensor of a FLUX-MoE."""

    __slots__ = ("weights",)
    weights: MoEWeights  # of the whole model


# Patches


def convert_patches(patches: dict, weights: MoEWeights) -> dict:
    """Return patches from comfy.lora.load_lora as a FLUX-MoE needs them.

    Raises ValueError for a LoRA of another model: blocks have the same shapes in every FLUX.1 of a size. A patch that
    does not fit another tensor is left out with a warning (img_in, for one, differs between FLUX.1's variants).
    """
    converted: dict[Any, Any] = {}
    misfits: list[tuple[str, str]] = []
    modulations: ModulationMap | None = None
    for target, patch in patches.items():
        name, offset = (target, None) if isinstance(target, str) else target[:2]
        change = shape_of_change(patch)
        shape = _narrow(weights.shapes.get(name), offset)
        dense_shape = _narrow(weights.compressed.get(name), offset)
        if dense_shape is not None and (change is None or fits(change, dense_shape)):
            if modulations is None:
                modulations = ModulationMap(weights.weight(f"{TRANSFORMER_PREFIX}adaln_in.weight"))
            converted[target] = modulations.map(patch, name, weights.weight)
        elif change is not None and shape is not None and not fits(change, shape):
            tensor, expected = name.removeprefix(TRANSFORMER_PREFIX), dense_shape or shape
            misfits.append(
                (tensor, f"{tensor} is {format_shape(expected)} here and {format_shape(change)} in the LoRA")
            )
        elif name in weights.neurons:
            converted[target] = _permute(patch, name, offset, *weights.neurons[name])
        else:
            converted[target] = patch
    for tensor, misfit in misfits:
        if Block.parse(tensor) is not None:
            raise ValueError(
                f"This LoRA was made for another model than FLUX.1, or for a FLUX.1 of another size: {misfit} "
                f"({len(misfits)} of its {len(patches)} changes do not fit). Nothing of it was applied."
            )
    for _, misfit in misfits:
        logging.warning(printable(f"FLUX-MoE: a part of this LoRA does not fit and is left out: {misfit}."))
    if modulations is not None:
        modulations.report()
    return converted


def _narrow(shape: WeightShape | None, offset: Offset | None) -> WeightShape | None:
    """Return the shape of the slice that `offset` takes."""
    if shape is None or offset is None:
        return shape
    axis, _, length = offset
    return (*shape[:axis], length, *shape[axis + 1 :])


def _permute(patch: Any, name: str, offset: Offset | None, axis: int, first: int, order: Tensor) -> Any:
    """Return a patch in the teacher's order of neurons as a patch for the tensor `name`, or its slice at `offset`."""
    if offset is not None and offset[0] == axis:
        start, end = offset[1], offset[1] + offset[2]
        if end <= first or start >= first + order.numel():
            return patch  # for rows that are not neurons, such as qkv
        if start > first or end < first + order.numel():
            raise ValueError(
                f"This LoRA changes rows {start} to {end} of {name}, a part of the FFN whose neurons are rows {first} to "
                f"{first + order.numel()}. A FLUX-MoE reorders its neurons, so a LoRA must change all of them or none."
            )
    return PermutedPatch(getattr(patch, "loaded_keys", set()), (axis, first, order, patch))


def _warn_if_foreign(keys: Iterable[str], patches: dict, weights: MoEWeights) -> None:
    """Warn in one line if a LoRA has nothing for the model. ComfyUI names each key that it did not load."""
    if any((target if isinstance(target, str) else target[0]) in weights.shapes for target in patches):
        return
    foreign = [key for key in keys if not key.startswith(_TEXT_ENCODERS)]
    if foreign:
        logging.warning(
            f"FLUX-MoE: this LoRA has nothing for FLUX.1: none of its {len(foreign)} tensors ({printable(foreign[0])}, …) "
            "has a name that LoRAs for FLUX.1 use. The model is unchanged."
        )


# Wrappers of ComfyUI's functions


def wrap_key_map(original: Callable[..., dict]) -> Callable[..., dict]:
    """Wrap comfy.lora.model_lora_keys_unet: for a FLUX-MoE, the values of the key map are MoEKeys."""

    @functools.wraps(original)
    def model_lora_keys_unet(model: Any, key_map: dict | None = None) -> dict:
        if isinstance(model, FluxMoEModel):
            restore_transformer(model)
        # ComfyUI's default is one dict for all calls, which would hand our keys to the next model.
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


def wrap_load_lora(original: Callable[..., dict]) -> Callable[..., dict]:
    """Wrap comfy.lora.load_lora: patches for a FLUX-MoE are converted."""

    @functools.wraps(original)
    def load_lora(lora: Any, to_load: dict, *args: Any, **kwargs: Any) -> dict:
        patches = original(lora, to_load, *args, **kwargs)
        names = (target if isinstance(target, str) else target[0] for target in to_load.values())
        weights = next((name.weights for name in names if isinstance(name, MoEKey)), None)
        if weights is None:
            return patches
        _warn_if_foreign(lora, patches, weights)
        return convert_patches(patches, weights)

    return load_lora


def wrap_bypass(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap comfy.sd.load_bypass_lora_for_models: for a FLUX-MoE, patch the LoRA into the weights.

    Bypass adds a LoRA's output to that of a module, and routed experts are not modules.
    """

    @functools.wraps(original)
    def load_bypass_lora_for_models(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is not None and isinstance(model.model, FluxMoEModel):
            logging.info("FLUX-MoE: the LoRA is patched into the weights; bypass mode does not reach routed experts.")
            return comfy.sd.load_lora_for_models(model, *args, **kwargs)
        return original(model, *args, **kwargs)

    return load_bypass_lora_for_models


def register() -> None:
    """Wrap ComfyUI's functions, unless they are wrapped already."""
    wraps: list[tuple[Any, str, Callable]] = [
        (comfy.lora, "model_lora_keys_unet", wrap_key_map),
        (comfy.lora, "load_lora", wrap_load_lora),
        (comfy.sd, "load_bypass_lora_for_models", wrap_bypass),
    ]
    for module, name, wrap in wraps:
        function = getattr(module, name)
        if not getattr(function, "knows_moe", False):
            wrapped = wrap(function)
            wrapped.knows_moe = True
            setattr(module, name, wrapped)

"""Patches made for a dense FLUX, on the weights of a FLUX-MoE.

Each wraps one of ComfyUI's patches, of any kind, and has ComfyUI apply it to the weight that it was made for. The
wrappers are weight adapters like others, so they go through all of ComfyUI's own paths: patched on loading, patched on
the fly in low VRAM, prefetched (adapters are then rebuilt from `loaded_keys` and `weights`). A wrapped patch is
anything that comfy.lora.calculate_weight takes: an adapter, or a tuple like ("diff", ...).

Shapes: H hidden size, A rank of the AdaLN compression, N outputs of a modulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.lora
import torch
from comfy.model_management import cast_to_device
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...d2m_model.adaln import dense_weight, map_change
from ...d2m_model.layout import inverse_order, permute_neurons


class PermutedPatch(WeightAdapterBase):
    """A patch made for the teacher's order of neurons, on a weight with reordered neurons.

    `weights` is (axis, first, neuron_order, patch).
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
        strength_model: float,  # already applied by ComfyUI
        offset: tuple[int, int, int] | None,  # by which ComfyUI has narrowed the weight
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
        # A slice must be changed in place. A weight that the patch enlarged cannot be.
        return weight.copy_(patched) if patched.shape == weight.shape else patched


class MappedPatch(WeightAdapterBase):
    """A patch made for a dense modulation, on the compressed weight lin', where lin' U stands for the dense one.

    `weights` is (down_AH, inverse_HA, patch): U and pinv(U), float32.
    """

    name = "mapped"

    def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, Tensor, Any]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple[int, int, int] | None,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        down_AH, inverse_HA = (cast_to_device(w, weight.device, torch.float32) for w in self.weights[:2])
        change_NH = dense_change(weight, down_AH, self.weights[2], key, strength, function)
        return weight.copy_(weight.float() + map_change(change_NH, inverse_HA))


def dense_change(
    lin_NA: Tensor,
    down_AH: Tensor,
    patch: Any,
    key: str,
    strength: float = 1.0,
    function: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return how `patch` changes the dense modulation lin' U: [N, H].

    Computed in float32 whatever the weight's dtype, since the change is small beside the weight.
    """
    dense_NH = dense_weight(lin_NA, down_AH)
    patches = [(strength, patch, 1.0, None, function)]
    patched_NH: Tensor = comfy.lora.calculate_weight(patches, dense_NH.clone(), key, torch.float32)
    return patched_NH - dense_NH

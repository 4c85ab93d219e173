"""LoRAs on the modulations of a file with AdaLN compression: mapped onto the compressed weight lin', with some loss.

Shapes: H hidden size, A rank of the AdaLN compression, N outputs of a modulation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy.model_management import get_torch_device
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...d2m_model.adaln import lost_change, lost_low_rank_change, map_change, pseudo_inverse
from .patches import MappedPatch, dense_change


class ModulationMap:
    """Maps the patches that one LoRA has for modulations, and sums up the loss."""

    def __init__(self, adaln_in_AH: Tensor) -> None:
        self.down_AH = adaln_in_AH.detach().to("cpu", torch.float32)
        self.inverse_HA = pseudo_inverse(self.down_AH)
        self.lost = self.total = 0.0  # squared norms
        self.modulations = 0

    def map(self, patch: Any, key: str, weight: Callable[[str], Tensor]) -> Any:
        """Return the patch for the compressed weight `key` that does what `patch` does to the dense one.

        `weight` returns the weight of a name as it is in the file.
        """
        is_plain_lora = isinstance(patch, LoRAAdapter) and patch.weights[3:] == (None, None, None)  # mid, dora, reshape
        return self._map_low_rank(patch) if is_plain_lora else self._map_any(patch, key, weight(key))

    def _map_low_rank(self, patch: LoRAAdapter) -> LoRAAdapter:
        """Return a LoRA again: (up down) pinv(U) = up (down pinv(U)). So a large model needs no dense matrices."""
        up, down, alpha, *rest = patch.weights
        up, down = up.flatten(1), down.flatten(1)
        inverse_HA = self.inverse_HA.to(down.device)
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        self._add_loss(*lost_low_rank_change(scale * up.float(), down, self.down_AH.to(down.device), inverse_HA))
        return LoRAAdapter(patch.loaded_keys, (up, map_change(down, inverse_HA), alpha, *rest))

    def _map_any(self, patch: Any, key: str, lin_NA: Tensor) -> MappedPatch:
        device = get_torch_device()
        if isinstance(lin_NA, QuantizedTensor):
            lin_NA = lin_NA.dequantize()
        down_AH, inverse_HA = self.down_AH.to(device), self.inverse_HA.to(device)
        self._add_loss(*lost_change(dense_change(lin_NA.detach().to(device), down_AH, patch, key), down_AH, inverse_HA))
        return MappedPatch(getattr(patch, "loaded_keys", set()), (self.down_AH, self.inverse_HA, patch))

    def _add_loss(self, lost: float, total: float) -> None:
        self.modulations += 1
        self.lost += lost
        self.total += total

    def report(self) -> None:
        """Log what the LoRA lost."""
        error = (self.lost / self.total) ** 0.5 if self.total else 0.0
        logging.info(
            f"FLUX-MoE: this LoRA changes {self.modulations} modulations, which the file stores compressed to "
            f"{self.down_AH.shape[0]} of {self.down_AH.shape[1]} directions. Changes in other directions are lost: "
            f"the relative error of the mapped change is {error:.4g}."
        )

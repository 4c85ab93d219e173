"""LoRAs on modulations, in a file with AdaLN compression: mapped onto lin', and what that loses of them.

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
    """Maps one LoRA's patches of modulations, and sums up what is lost of their changes."""

    def __init__(self, adaln_in_AH: Tensor) -> None:
        self.down_AH = adaln_in_AH.detach().to("cpu", torch.float32)
        self.inverse_HA = pseudo_inverse(self.down_AH)
        self.lost = self.whole = 0.0
        self.modulations = 0

    def map(self, patch: Any, key: str, weight: Callable[[str], Tensor]) -> Any:
        """The patch for the compressed weight `key` that `patch` is for the dense one."""
        low_rank = isinstance(patch, LoRAAdapter) and patch.weights[3:] == (None, None, None)  # mid, dora, reshape
        return self._low_rank(patch) if low_rank else self._any(patch, key, weight(key))

    def _low_rank(self, patch: LoRAAdapter) -> LoRAAdapter:
        """(up down) pinv(U) is up (down pinv(U)): a LoRA again, so nothing dense is ever made of a 12 B model's."""
        up, down, alpha, *rest = patch.weights
        up, down = up.flatten(1), down.flatten(1)
        inverse_HA = self.inverse_HA.to(down.device)
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        self._count(*lost_low_rank_change(scale * up.float(), down, self.down_AH.to(down.device), inverse_HA))
        return LoRAAdapter(patch.loaded_keys, (up, map_change(down, inverse_HA), alpha, *rest))

    def _any(self, patch: Any, key: str, lin_NA: Tensor) -> MappedPatch:
        device = get_torch_device()
        if isinstance(lin_NA, QuantizedTensor):
            lin_NA = lin_NA.dequantize()
        down_AH, inverse_HA = self.down_AH.to(device), self.inverse_HA.to(device)
        self._count(*lost_change(dense_change(lin_NA.detach().to(device), down_AH, patch, key), down_AH, inverse_HA))
        return MappedPatch(getattr(patch, "loaded_keys", set()), (self.down_AH, self.inverse_HA, patch))

    def _count(self, lost: float, whole: float) -> None:
        self.modulations += 1
        self.lost += lost
        self.whole += whole

    def report(self) -> None:
        """Say once what the LoRA lost."""
        error = (self.lost / self.whole) ** 0.5 if self.whole else 0.0
        logging.info(
            f"FLUX-MoE: this LoRA changes {self.modulations} modulations, which the file holds compressed to "
            f"{self.down_AH.shape[0]} of {self.down_AH.shape[1]} directions. What does not lie in these is lost: "
            f"the relative error of the mapped change is {error:.4g}."
        )

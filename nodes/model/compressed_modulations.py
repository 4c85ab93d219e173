"""Modulations of a file with AdaLN compression (see d2m_model/adaln.py) in ComfyUI's own FLUX.

Only the layer `lin` of a compressed modulation is new. It takes H values like the dense one, but its weight is [N, A];
it is a layer of the model's own operations. Blocks, modulations and the vec that they are given stay ComfyUI's.

Shapes: B batch, H hidden size, A rank of the compression, N outputs of a modulation (6H or 3H).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.ops
import torch
from comfy.ldm.flux.layers import Modulation
from torch import Tensor, nn

from ...d2m_model.adaln import compress


class CompressedLinear:
    """Mixin for a Linear of the model's operations: applies U, then the compressed weight lin'."""

    # U, in a tuple because as a child module it would be saved once per modulation.
    projection: tuple[nn.Module]

    def forward(self, x_BH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (adaln_in,) = self.projection
        weight_AH, _, token = comfy.ops.cast_bias_weight(
            adaln_in, dtype=torch.float32, bias_dtype=torch.float32, device=x_BH.device, offloadable=True
        )
        x_BA = compress(x_BH, weight_AH)
        comfy.ops.uncast_bias_weight(adaln_in, weight_AH, None, token)
        y_BN: Tensor = super().forward(x_BA, *args, **kwargs)  # type: ignore[misc]
        return y_BN


def modulations(flux: nn.Module) -> Iterator[tuple[str, Modulation]]:
    """Yield the modulations of all blocks, dense ones included, with their names. The final layer has no Modulation."""
    return ((name, module) for name, module in flux.named_modules() if isinstance(module, Modulation))


def compress_modulations(
    flux: nn.Module, stored_AH: Tensor, operations: Any, dtype: torch.dtype | None, device: torch.device | None
) -> None:
    """Add an empty U, in the dtype that it has in the file, and an empty lin' to every modulation."""
    rank, hidden_size = stored_AH.shape
    # Not a layer of the model's own operations, which might quantise it.
    adaln_in = comfy.ops.manual_cast.Linear(hidden_size, rank, bias=False, dtype=stored_AH.dtype, device=device)
    flux.adaln_in = adaln_in
    compressed = type("CompressedLinear", (CompressedLinear, operations.Linear), {})
    for _, modulation in modulations(flux):
        outputs = modulation.multiplier * hidden_size
        modulation.lin = compressed(rank, outputs, bias=True, dtype=dtype, device=device)
        modulation.lin.projection = (adaln_in,)

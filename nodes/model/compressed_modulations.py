"""Modulations of a file with AdaLN compression (see d2m_model/adaln.py) in ComfyUI's own FLUX.

Of a compressed modulation only `lin` is new: a layer of the model's own operations that takes H values like the dense
one and whose weight is [N, A]. Blocks, modulations and the vec they are given stay ComfyUI's.

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
    """Mixed into a Linear of the model's operations: lin' behind U."""

    # In a tuple: as a child of every modulation, U would be a tensor of each of them.
    projection: tuple[nn.Module]

    def forward(self, x_BH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (adaln_in,) = self.projection
        weight_AH, _, token = comfy.ops.cast_bias_weight(
            adaln_in, dtype=torch.float32, bias_dtype=torch.float32, device=x_BH.device, offloadable=True
        )
        x_BA = compress(x_BH, weight_AH)
        comfy.ops.uncast_bias_weight(adaln_in, weight_AH, None, token)
        found: Tensor = super().forward(x_BA, *args, **kwargs)  # type: ignore[misc]
        return found


def modulations(flux: nn.Module) -> Iterator[tuple[str, Modulation]]:
    """Every block's modulations, dense blocks' included, by name. The final layer's is none of them."""
    return ((name, module) for name, module in flux.named_modules() if isinstance(module, Modulation))


def compress_modulations(
    flux: nn.Module, stored_AH: Tensor, operations: Any, dtype: torch.dtype | None, device: torch.device | None
) -> None:
    """Make room for U, in the dtype of its file, and for every lin'."""
    rank, hidden_size = stored_AH.shape
    # Not of the model's own operations, which may want to quantise it.
    adaln_in = comfy.ops.manual_cast.Linear(hidden_size, rank, bias=False, dtype=stored_AH.dtype, device=device)
    flux.adaln_in = adaln_in
    compressed = type("CompressedLinear", (CompressedLinear, operations.Linear), {})
    for _, modulation in modulations(flux):
        outputs = modulation.multiplier * hidden_size
        modulation.lin = compressed(rank, outputs, bias=True, dtype=dtype, device=device)
        modulation.lin.projection = (adaln_in,)

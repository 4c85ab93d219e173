"""Weights of ComfyUI's layers as routed FFNs use them: cast for one call, whole or in part, in float8 as they are stored.

Shapes: T tokens, I input and O output features of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(slots=True)
class CastLinear:
    """Weight and bias of a layer, cast for one call. Until `release` nothing else may be cast (see `router_weights`).

    weight     [O, I], in the input's dtype, or in float8 as it is stored
    scale      float32 number that multiplies a weight in float8; None for other weights
    quantised  ComfyUI's description of a weight in float8
    """

    linear: Any
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    quantised: Any
    cast: tuple[Tensor, Tensor, Any]

    def product(self, x: Tensor, bias: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
        """Multiply x [..., I] by the first rows and columns of the weight (None: all), and add `bias`.

        In float8 as ComfyUI's own layer does it.
        """
        weight = self.weight[:rows, :columns]
        if self.scale is None:
            return F.linear(x, weight, bias)
        layout, linear = self.quantised._layout_cls, self.linear
        part = QuantizedTensor(weight, layout, replace(self.quantised._params, orig_shape=tuple(weight.shape)))
        if linear._full_precision_mm or getattr(linear, "comfy_force_cast_weights", False):
            return F.linear(x, part.dequantize(), bias)
        scale = getattr(linear, "input_scale", None)
        if scale is not None:
            scale = comfy.model_management.cast_to_device(scale, x.device, None)
        x_TI = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), layout, scale=scale)
        return F.linear(x_TI, part, bias).view(*x.shape[:-1], -1)

    def release(self) -> None:
        """Give the cast back to ComfyUI, after its last use."""
        comfy.ops.uncast_bias_weight(self.linear, *self.cast)


def cast_linear(linear: Any, x: Tensor, *, keep_float8: bool = False) -> CastLinear:
    """Cast weight and bias of `linear` for x as ComfyUI does: patched, moved and dequantised once.

    With `keep_float8` a weight in float8 stays as it is stored, if nothing but one number scales it.
    """
    cast = comfy.ops.cast_bias_weight(linear, x, offloadable=True)
    weight, bias, _ = cast
    smoothing = getattr(linear, "pre_quant_scale", None)  # scales the layer's input, and therefore the weight's columns
    if isinstance(weight, QuantizedTensor):
        if keep_float8 and smoothing is None and weight._qdata.dtype in _FLOAT8 and weight._params.scale.numel() == 1:
            return CastLinear(linear, weight._qdata, bias, weight._params.scale.float(), weight, cast)
        weight = weight.dequantize()
    if smoothing is not None:
        weight = weight * comfy.model_management.cast_to_device(smoothing, weight.device, weight.dtype)
    return CastLinear(linear, weight, bias, None, None, cast)


def router_linear(weight: Tensor, bias: bool, device: torch.device | None) -> nn.Linear:
    """Make an empty layer for `weight`, in the file's dtype, so that choices do not depend on the model's dtype.

    It is not a layer of the model's own operations, which might quantise it.
    """
    layer: nn.Linear = comfy.ops.manual_cast.Linear(
        weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype, device=device
    )
    return layer


def router_weights(router: nn.Linear, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a router's layer on `device`, in their own dtype, for as long as they are needed.

    ComfyUI casts offloaded layers into one buffer per offload stream, where the next casts overwrite them. A router needs
    several layers at once, so their casts are copied, which at their size costs little.
    """
    dtype = router.weight.dtype
    weight, bias, token = comfy.ops.cast_bias_weight(
        router, dtype=dtype, bias_dtype=dtype, device=device, offloadable=True
    )
    if weight is not router.weight:
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    comfy.ops.uncast_bias_weight(router, weight, bias, token)
    return weight, bias

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
from comfy.quant_ops import QuantizedTensor, get_layout_class
from torch import Tensor, nn

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(slots=True)
class CastLinear:
    """Weight and bias of a layer, cast for one call. Until `release` nothing else may be cast (see `router_weights`).

    weight     [O, I], in the input's dtype, or in float8 as it is stored
    scale      float32 number that multiplies a weight in float8; None for other weights
    quantised  ComfyUI's description of a weight in float8 that its own layer multiplies in float8; None for other weights
    """

    linear: Any
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    quantised: Any
    cast: tuple[Tensor, Tensor, Any]

    def product(self, x: Tensor, bias: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
        """Multiply x [..., I] by the first rows and columns of the weight (None: all), and add `bias`.

        As ComfyUI's own layer does it: in float8, or on the converted part.
        """
        weight = self.weight[:rows, :columns]
        if self.quantised is None:
            return F.linear(x, weight.to(x.dtype), bias)
        layout, linear = self.quantised._layout_cls, self.linear
        part = QuantizedTensor(weight, layout, replace(self.quantised._params, orig_shape=tuple(weight.shape)))
        if getattr(linear, "_full_precision_mm", False) or getattr(linear, "comfy_force_cast_weights", False):
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

    With `keep_float8` a weight that `is_float8` stays as it is stored.
    """
    kept = keep_float8 and is_float8(linear)
    merely_stored = kept and linear.weight.dtype in _FLOAT8  # the dtype of a QuantizedTensor is that of its values
    cast = comfy.ops.cast_bias_weight(
        linear,
        dtype=linear.weight.dtype if merely_stored else x.dtype,
        device=x.device,
        bias_dtype=x.dtype,
        compute_dtype=x.dtype,
        offloadable=True,
    )
    weight, bias, _ = cast
    if kept and isinstance(weight, QuantizedTensor):
        return CastLinear(linear, weight._qdata, bias, weight._params.scale.float(), weight, cast)
    if merely_stored and weight.dtype in _FLOAT8:  # not where ComfyUI has patched it on its way
        scale = torch.ones((), device=x.device)
        return CastLinear(linear, weight, bias, scale, _multiplied_in_float8(linear, weight, scale, x.dtype), cast)
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    smoothing = getattr(linear, "pre_quant_scale", None)  # scales the layer's input, and therefore the weight's columns
    if smoothing is not None:
        weight = weight * comfy.model_management.cast_to_device(smoothing, weight.device, weight.dtype)
    return CastLinear(linear, weight, bias, None, None, cast)


def is_float8(linear: Any) -> bool:
    """Return whether the weight is stored in float8, is not patched as it is used, and at most one number scales it."""
    weight = linear.weight
    if linear.weight_function or getattr(linear, "pre_quant_scale", None) is not None:
        return False
    if isinstance(weight, QuantizedTensor):
        return weight._qdata.dtype in _FLOAT8 and weight._params.scale.numel() == 1
    return weight.dtype in _FLOAT8


def _multiplied_in_float8(linear: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
    """Describe a weight that is merely stored in float8, if ComfyUI was started to multiply such weights in float8.

    Its layers then quantise their input with a scale of 1 (`--fast fp8_matrix_mult`), for this one format.
    """
    if not isinstance(linear, comfy.ops.fp8_ops.Linear) or weight.dtype != torch.float8_e4m3fn:
        return None
    layout = "TensorCoreFP8Layout"
    params = get_layout_class(layout).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(weight.shape))
    return QuantizedTensor(weight, layout, params)


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

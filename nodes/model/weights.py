"""Weights of ComfyUI's layers as routed FFNs use them: cast for one call, in the shared expert's part and the others'.

Shapes: T tokens, I input and O output features of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class
from torch import Tensor, nn

from ...d2m_model.tensor_file import FLOAT8
from .quantised_parts import divided


@dataclass(slots=True)
class CastLinear:
    """Weight and bias of a layer, cast for one call. Until `release` nothing else may be cast (see `router_weights`).

    shared   the part of the weight that every token is multiplied by: in the input's dtype, quantised, or in float8
    experts  the other part, in the input's dtype, or in float8 as it is stored
    scale    float32 number that multiplies `experts` in float8; None for other weights
    """

    linear: Any
    shared: Tensor
    experts: Tensor
    bias: Tensor
    scale: Tensor | None
    cast: tuple[Tensor, Tensor, Any]

    def product(self, x: Tensor, bias: Tensor) -> Tensor:
        """Multiply x [..., I] by the shared part and add `bias`, as ComfyUI's own layer does: quantised where it is."""
        shared, linear = self.shared, self.linear
        if not isinstance(shared, QuantizedTensor):
            return F.linear(x, shared.to(x.dtype), bias)
        if not _multiplies_quantised(linear):
            return F.linear(x, shared.dequantize(), bias)
        if not QUANT_ALGOS.get(getattr(linear, "quant_format", None), {}).get("quantize_input", True):
            return F.linear(x, shared, bias)  # the product itself quantises x
        scale = getattr(linear, "input_scale", None)
        if scale is not None:
            scale = comfy.model_management.cast_to_device(scale, x.device, None)
        x_TI = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), shared._layout_cls, scale=scale)
        return F.linear(x_TI, shared, bias).reshape(*x.shape[:-1], -1)

    def release(self) -> None:
        """Give the cast back to ComfyUI, after its last use."""
        comfy.ops.uncast_bias_weight(self.linear, *self.cast)


def cast_linear(linear: Any, x: Tensor, axis: int, cut: int, *, keep_float8: bool = False) -> CastLinear:
    """Cast weight and bias of `linear` for x as ComfyUI does: patched and moved once.

    The shared part of the weight [O, I] ends at index `cut` of `axis`. With `keep_float8` the experts' part of a weight
    that `is_float8` stays as it is stored. Of other quantised weights the experts' part alone is dequantised, if the device
    multiplies the shared part as it is stored.
    """
    kept = keep_float8 and is_float8(linear)
    merely_stored = kept and linear.weight.dtype in FLOAT8  # the dtype of a QuantizedTensor is that of its values
    cast = comfy.ops.cast_bias_weight(
        linear,
        dtype=linear.weight.dtype if merely_stored else x.dtype,
        device=x.device,
        bias_dtype=x.dtype,
        compute_dtype=x.dtype,
        offloadable=True,
    )
    weight, bias, _ = cast
    smoothing = getattr(linear, "pre_quant_scale", None)  # scales the layer's input, and therefore the weight's columns
    if isinstance(weight, QuantizedTensor):
        in_parts = smoothing is None and (kept or (_in_parts(x) and _multiplies_quantised(linear)))
        if in_parts and (parts := divided(weight, getattr(linear, "quant_format", None), axis, cut)) is not None:
            shared, experts = parts
            if kept:
                return CastLinear(linear, shared, experts._qdata, bias, experts._params.scale.float(), cast)
            return CastLinear(linear, shared, experts.dequantize(), bias, None, cast)
        weight = weight.dequantize()
    if smoothing is not None:
        weight = weight * comfy.model_management.cast_to_device(smoothing, weight.device, weight.dtype)
    shared, experts, scale = weight.narrow(axis, 0, cut), weight.narrow(axis, cut, weight.shape[axis] - cut), None
    if weight.dtype in FLOAT8:  # merely stored so, and not patched by ComfyUI on its way
        scale = torch.ones((), device=x.device)
        shared = _multiplied_in_float8(linear, shared, scale, x.dtype)
    return CastLinear(linear, shared, experts, bias, scale, cast)


def is_float8(linear: Any) -> bool:
    """Return whether the weight is stored in float8, is not patched as it is used, and at most one number scales it."""
    weight = linear.weight
    if linear.weight_function or getattr(linear, "pre_quant_scale", None) is not None:
        return False
    if isinstance(weight, QuantizedTensor):
        return weight._qdata.dtype in FLOAT8 and weight._params.scale.numel() == 1
    return weight.dtype in FLOAT8


def _in_parts(x: Tensor) -> bool:
    """Return whether a weight is used in parts: on a GPU, where products of quantised weights are the faster ones."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _multiplies_quantised(linear: Any) -> bool:
    """Return whether ComfyUI's own layer multiplies its weight as it is stored, on this device and by its settings."""
    return not (getattr(linear, "_full_precision_mm", False) or getattr(linear, "comfy_force_cast_weights", False))


def _multiplied_in_float8(linear: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight that is merely stored in float8 as a quantised one, if ComfyUI multiplies such weights in float8.

    It does so when started with `--fast fp8_matrix_mult`, for this one format, with a scale of 1 for the input as well.
    """
    multiplied = isinstance(linear, comfy.ops.fp8_ops.Linear) and weight.dtype == torch.float8_e4m3fn
    if not multiplied or torch.compiler.is_compiling():  # a QuantizedTensor breaks graphs
        return weight
    layout = "TensorCoreFP8Layout"
    params = get_layout_class(layout).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(weight.shape))
    quantised: Tensor = QuantizedTensor(weight, layout, params)
    return quantised


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

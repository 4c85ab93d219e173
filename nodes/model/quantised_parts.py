"""Quantised weights of ComfyUI in two parts, without a change of their values: those of the shared expert and the others.

Scales of single blocks are stored in tiles of 128 rows by 4 blocks, the order that NVIDIA's products read. A cut between
tiles divides them; another cut would need them written anew.

Shapes: O rows (output features), I columns (input features).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

_TILE_ROWS, _TILE_BLOCKS = 128, 4


def divided(
    weight: QuantizedTensor, kind: str | None, axis: int, cut: int
) -> tuple[QuantizedTensor, QuantizedTensor] | None:
    """Return the parts of a weight [O, I] before and from index `cut` of `axis`; None if this format cannot be cut there.

    `kind` is ComfyUI's name of the format.
    """
    if kind in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise"):
        return _by_rows(weight, axis, cut)
    if kind in ("nvfp4", "mxfp8"):
        return _by_tiles(weight, kind, axis, cut)
    return None


def _by_rows(weight: QuantizedTensor, axis: int, cut: int) -> tuple[QuantizedTensor, QuantizedTensor] | None:
    """Divide a weight with one scale, or with one for each row."""
    params, scale = weight._params, weight._params.scale
    if axis == 1 and getattr(params, "convrot", False) and cut % params.convrot_groupsize:
        return None  # its columns are rotated in groups
    scales = (scale, scale) if scale.numel() == 1 or axis == 1 else _parts(scale, 0, cut)
    return _joined(weight, axis, cut, _parts(weight._qdata, axis, cut), "scale", scales)


def _by_tiles(
    weight: QuantizedTensor, kind: str, axis: int, cut: int
) -> tuple[QuantizedTensor, QuantizedTensor] | None:
    """Divide a weight with a scale for each block of `group_size` columns."""
    name = "block_scale" if kind == "nvfp4" else "scale"
    scale, (rows, columns) = getattr(weight._params, name), weight._qdata.shape
    per_byte = 2 if kind == "nvfp4" else 1
    tile = _TILE_ROWS if axis == 0 else _TILE_BLOCKS * QUANT_ALGOS[kind]["group_size"]
    tiles = -(-rows // _TILE_ROWS), -(-columns * per_byte // (_TILE_BLOCKS * QUANT_ALGOS[kind]["group_size"]))
    if cut % tile or scale.numel() != tiles[0] * tiles[1] * _TILE_ROWS * _TILE_BLOCKS:
        return None
    tiled = scale.view(torch.uint8).reshape(*tiles, _TILE_ROWS * _TILE_BLOCKS)
    scales = (
        part.reshape(part.shape[0] * _TILE_ROWS, part.shape[1] * _TILE_BLOCKS).view(scale.dtype)
        for part in _parts(tiled, axis, cut // tile)
    )
    first, rest = _parts(weight._qdata, axis, cut // per_byte if axis == 1 else cut)
    # The products of these formats take no strides.
    return _joined(weight, axis, cut, (first.contiguous(), rest.contiguous()), name, tuple(scales))


def _parts(tensor: Tensor, axis: int, cut: int) -> tuple[Tensor, Tensor]:
    return tensor.narrow(axis, 0, cut), tensor.narrow(axis, cut, tensor.shape[axis] - cut)


def _joined(
    weight: QuantizedTensor, axis: int, cut: int, stored: tuple[Tensor, Tensor], name: str, scales: tuple[Tensor, ...]
) -> tuple[QuantizedTensor, QuantizedTensor]:
    def part(length: int, values: Tensor, scale: Tensor) -> QuantizedTensor:
        shape = list(weight._params.orig_shape)
        shape[axis] = length
        new: dict[str, Any] = {name: scale, "orig_shape": tuple(shape)}
        return QuantizedTensor(values, weight._layout_cls, replace(weight._params, **new))

    whole = weight._params.orig_shape[axis]
    return part(cut, stored[0], scales[0]), part(whole - cut, stored[1], scales[1])

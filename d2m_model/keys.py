"""Tensor names of FLUX.1 in BFL's style (files and ComfyUI) and in diffusers', and the conversion between them.

BFL fuses q, k, v (and, in single blocks, the FFN's up-projection) into one matrix; diffusers keeps them separate.
The final modulation is (shift, scale) in BFL's style and (scale, shift) in diffusers'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .blocks import BFL_BLOCKS, DIFFUSERS_BLOCKS, BlockKind
from .config import FluxDims

CHECKPOINT_PREFIX = "model.diffusion_model."  # in full checkpoints and some files saved by ComfyUI
HEAD = 128  # channels of an attention head in every FLUX.1
TIME_CHANNELS = 256  # of the sinusoidal embedding of timestep or guidance

T = TypeVar("T")


@dataclass(kw_only=True, slots=True, frozen=True)
class Landmarks:
    """Names of the tensors that show a FLUX.1's dimensions, and of its lists of blocks."""

    img_in: str
    txt_in: str
    vector_in: str
    final: str
    guidance: str
    blocks: Mapping[BlockKind, str]


BFL = Landmarks(
    img_in="img_in.weight",
    txt_in="txt_in.weight",
    vector_in="vector_in.in_layer.weight",
    final="final_layer.linear.weight",
    guidance="guidance_in.in_layer.weight",
    blocks=BFL_BLOCKS,
)
DIFFUSERS = Landmarks(
    img_in="x_embedder.weight",
    txt_in="context_embedder.weight",
    vector_in="time_text_embed.text_embedder.linear_1.weight",
    final="proj_out.weight",
    guidance="time_text_embed.guidance_embedder.linear_1.weight",
    blocks=DIFFUSERS_BLOCKS,
)


def landmarks_of(names: Iterable[str]) -> Landmarks:
    """Return DIFFUSERS if a single block is named in its style, which no other model has; otherwise BFL."""
    single = f"{DIFFUSERS_BLOCKS['single']}."
    return DIFFUSERS if any(name.startswith(single) for name in names) else BFL


def prefix_of(names: Iterable[str]) -> str:
    """Return `model.diffusion_model.` if any tensor's name starts with it, otherwise an empty string."""
    return CHECKPOINT_PREFIX if any(name.startswith(CHECKPOINT_PREFIX) for name in names) else ""


def strip_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the transformer's tensors by BFL name: without the checkpoint prefix, norms as `.scale`.

    In a full checkpoint, tensors without the prefix (a VAE, for example) are dropped.
    """
    prefix = prefix_of(tensors)
    return {bfl_spelling(name[len(prefix) :]): value for name, value in tensors.items() if name.startswith(prefix)}


def bfl_spelling(name: str) -> str:
    """Return `query_norm.scale` for `query_norm.weight`, the name in ComfyUI's modules and some files; others unchanged."""
    if name.endswith(("query_norm.weight", "key_norm.weight")):
        return name.removesuffix("weight") + "scale"
    return name


def dense_shapes(dims: FluxDims) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a dense FLUX.1 with these dimensions, in BFL names."""
    h, n = dims.hidden_size, dims.neurons
    linears = {
        "img_in": (h, dims.in_channels),
        "txt_in": (h, dims.context_size),
        "time_in.in_layer": (h, TIME_CHANNELS),
        "time_in.out_layer": (h, h),
        "vector_in.in_layer": (h, dims.vector_size),
        "vector_in.out_layer": (h, h),
        "final_layer.linear": (dims.out_channels, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    if dims.guidance_embed:
        linears |= {"guidance_in.in_layer": (h, TIME_CHANNELS), "guidance_in.out_layer": (h, h)}
    norms = []
    for ffn in dims.ffns:
        block, (up, down) = ffn.block.name, ffn.linears
        if ffn.stream == "joint":
            linears |= {f"{block}.modulation.lin": (3 * h, h), up: (3 * h + n, h), down: (h, h + n)}
            norms.append(f"{block}.norm")
        else:
            stream = f"{block}.{ffn.stream}"
            linears |= {
                f"{stream}_mod.lin": (6 * h, h),
                f"{stream}_attn.qkv": (3 * h, h),
                f"{stream}_attn.proj": (h, h),
                up: (n, h),
                down: (h, n),
            }
            norms.append(f"{stream}_attn.norm")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    for name in norms:
        shapes[f"{name}.query_norm.scale"] = shapes[f"{name}.key_norm.scale"] = (HEAD,)
    return shapes


@dataclass(kw_only=True, slots=True, frozen=True)
class DiffusersSource:
    """The diffusers tensors whose stacked rows are a BFL tensor. `swap`: its two halves are exchanged."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    swap: bool = False


def diffusers_sources(dims: FluxDims) -> dict[str, DiffusersSource]:
    """Return the source in diffusers' FluxTransformer2DModel of every tensor of a dense FLUX.1, by BFL name."""
    modules: dict[str, tuple[str, ...]] = {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    }
    for bfl, diffusers in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        modules[f"{bfl}.in_layer"] = (f"time_text_embed.{diffusers}_embedder.linear_1",)
        modules[f"{bfl}.out_layer"] = (f"time_text_embed.{diffusers}_embedder.linear_2",)
    norms = {}
    for block in dims.blocks:
        bfl, diffusers = block.name, block.diffusers_name
        qkv = tuple(f"{diffusers}.attn.to_{x}" for x in "qkv")
        for ffn in block.ffns:
            modules |= {part: (name,) for part, name in zip(ffn.linears, ffn.diffusers_linears, strict=True)}
        if block.kind == "double":
            modules |= {
                f"{bfl}.img_mod.lin": (f"{diffusers}.norm1.linear",),
                f"{bfl}.txt_mod.lin": (f"{diffusers}.norm1_context.linear",),
                f"{bfl}.img_attn.qkv": qkv,
                f"{bfl}.txt_attn.qkv": tuple(f"{diffusers}.attn.add_{x}_proj" for x in "qkv"),
                f"{bfl}.img_attn.proj": (f"{diffusers}.attn.to_out.0",),
                f"{bfl}.txt_attn.proj": (f"{diffusers}.attn.to_add_out",),
            }
            norms[f"{bfl}.img_attn.norm"] = f"{diffusers}.attn.norm_"
            norms[f"{bfl}.txt_attn.norm"] = f"{diffusers}.attn.norm_added_"
        else:
            up = block.ffns[0].linears[0]
            modules[up] = (*qkv, *modules[up])
            modules[f"{bfl}.modulation.lin"] = (f"{diffusers}.norm.linear",)
            norms[f"{bfl}.norm"] = f"{diffusers}.attn.norm_"

    sources = {}
    for name, shape in dense_shapes(dims).items():
        module, kind = name.rsplit(".", 1)
        if kind == "scale":
            norm, which = module.rsplit(".", 1)
            sources[name] = DiffusersSource(names=(f"{norms[norm]}{which[0]}.weight",), rows=shape)
            continue
        parts = modules[module]
        # Only the last part may be larger than the others: the up-projection after q, k, v.
        rows = (*[dims.hidden_size] * (len(parts) - 1), shape[0] - dims.hidden_size * (len(parts) - 1))
        swap = module == "final_layer.adaLN_modulation.1"
        sources[name] = DiffusersSource(names=tuple(f"{part}.{kind}" for part in parts), rows=rows, swap=swap)
    return sources


def diffusers_shapes(dims: FluxDims) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a dense FLUX.1 with these dimensions, in diffusers' names."""
    dense = dense_shapes(dims)
    return {
        part: (rows, *dense[name][1:])
        for name, source in diffusers_sources(dims).items()
        for part, rows in zip(source.names, source.rows, strict=True)
    }


def bfl_tensors(tensors: Mapping[str, Tensor], dims: FluxDims) -> dict[str, Tensor]:
    """Convert diffusers' tensors to BFL's. Fused tensors are new; the others are the given ones."""
    result = {}
    for name, source in diffusers_sources(dims).items():
        parts = [tensors[part] for part in source.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        result[name] = swap_halves(tensor) if source.swap else tensor
    return result


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchange (shift, scale) with (scale, shift) along the first axis."""
    return torch.cat(tensor.chunk(2)[::-1])

"""Tiny FLUX files: a dense teacher with random weights, and the FLUX-MoE that it splits into.

Written here from layout.py alone, so that these tests do not stand on the converter that they help to judge.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2m_model.config import BlockGroup, FFNLayout, FluxDims, FluxMoEConfig, Gate, Teacher, all_ffn_names
from d2m_model.layout import ffn_tensors, neuron_axis, permute_neurons
from d2m_model.routers import TOP_K_ROUTER, CapacityRouter
from d2m_model.stand_ins import stand_in_shapes

DIMS = FluxDims(
    hidden_size=128, double_blocks=2, single_blocks=3, in_channels=64, out_channels=64,
    context_size=64, vector_size=32, guidance_embed=True,
)  # fmt: skip
LAYOUT = FFNLayout(shared=128, experts=12, width=32)
HEAD = 128  # FLUX's head size
KEPT = (
    "router",
    ".stand_ins.",
    ".capacity.",
    ".threshold",
    ".expert_mean",
    "adaln_in",
)  # parts of names of what stays in float32


def dense_flux(dims: FluxDims = DIMS, seed: int = 0) -> dict[str, Tensor]:
    """A FLUX of these sizes in BFL keys. Weights are large enough for every part to count in the output."""
    h, generator = dims.hidden_size, torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def linear(name: str, out: int, width: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = torch.randn(out, width, generator=generator) * gain * width**-0.5
        tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def embedder(name: str, width: int) -> None:
        linear(f"{name}.in_layer", h, width)
        linear(f"{name}.out_layer", h, h)

    def norms(name: str) -> None:
        for which in ("query_norm", "key_norm"):
            tensors[f"{name}.{which}.scale"] = 1 + 0.1 * torch.randn(HEAD, generator=generator)

    linear("img_in", h, dims.in_channels)
    linear("txt_in", h, dims.context_size)
    embedder("time_in", 256)
    embedder("vector_in", dims.vector_size)
    if dims.guidance_embed:
        embedder("guidance_in", 256)
    for i in range(dims.double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * h, h)
            linear(f"{block}_attn.qkv", 3 * h, h)
            linear(f"{block}_attn.proj", h, h)
            norms(f"{block}_attn.norm")
            linear(f"{block}_mlp.0", 4 * h, h)
            linear(f"{block}_mlp.2", h, 4 * h)
    for i in range(dims.single_blocks):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", 3 * h, h)
        linear(f"{block}.linear1", 7 * h, h)
        linear(f"{block}.linear2", h, 5 * h)
        norms(f"{block}.norm")
    linear("final_layer.adaLN_modulation.1", 2 * h, h)
    linear("final_layer.linear", dims.out_channels, h)
    return tensors


def compressible(
    dense: dict[str, Tensor], rank: int, dims: FluxDims = DIMS, seed: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A teacher like `dense` whose modulations read `rank` directions of vec, and what stands for them in a file with
    AdaLN compression, which is then that teacher exactly. U's rows are of any length and angle."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, dims.hidden_size, generator=generator) * torch.linspace(0.5, 2, rank)[:, None]
    compressed = {"adaln_in.weight": down}
    for name, tensor in dense.items():
        if name.endswith(("_mod.lin.weight", ".modulation.lin.weight")):
            gain = tensor.norm() / down.norm() * rank**0.5
            compressed[name] = torch.randn(tensor.shape[0], rank, generator=generator) * gain * tensor.shape[0] ** -0.5
    low_rank = {name: lin @ down for name, lin in compressed.items() if name != "adaln_in.weight"}
    return dense | low_rank, compressed


def split(
    dense: dict[str, Tensor],
    dims: FluxDims = DIMS,
    layout: FFNLayout = LAYOUT,
    gate: Gate = Gate(mode="sum", scale=2.0),  # noqa: B008 (frozen)
    mean: bool = False,
    dense_double_blocks: int = 1,
    seed: int = 1,
    compressed: dict[str, Tensor] | None = None,
    groups: tuple[BlockGroup, ...] = (),
    capacity: CapacityRouter | None = None,
    stand_in_rank: int | None = None,
) -> dict[str, Tensor]:
    """The FLUX-MoE of `dense`: random neuron orders and random routers. The first double blocks stay dense.

    `compressed`: modulations to write in place of the teacher's, see `compressible`. `groups`, `capacity` and
    `stand_in_rank` add tensors and change none of the others.
    """
    generator, extra = (torch.Generator().manual_seed(s) for s in (seed, seed + 1000))
    skipped = tuple(f"double_blocks.{i}." for i in range(dense_double_blocks))
    ffns = {name: layout for name in all_ffn_names(dims) if not name.startswith(skipped)}
    tensors = dense | (compressed or {})
    for name in ffns:
        order = torch.randperm(layout.neurons, generator=generator).to(torch.int32)
        places = ffn_tensors(name, dims.hidden_size)
        for key in (f"{places.up}.weight", f"{places.up}.bias", f"{places.down}.weight"):
            axis, first = neuron_axis(key, name, dims.hidden_size)
            tensors[key] = permute_neurons(tensors[key], axis, first, order)
        tensors[f"{name}.neuron_order"] = order
        tensors[f"{name}.router.weight"] = torch.randn(layout.experts, dims.hidden_size, generator=generator)
        tensors[f"{name}.router.bias"] = torch.randn(layout.experts, generator=generator) * 0.1
        if mean:
            tensors[f"{name}.expert_mean"] = torch.randn(layout.experts, dims.hidden_size, generator=generator) * 0.1
        if capacity is not None:
            tensors |= capacity_tensors(name, dims, layout, capacity, extra)
    for index, group in enumerate(groups):
        for router in ("router_x", "router_y"):
            weight = torch.randn(group.blocks, dims.hidden_size, generator=extra)
            tensors[f"block_groups.{index}.{router}.weight"] = weight
    more = torch.Generator().manual_seed(seed + 2000)
    for index, group in enumerate(groups if stand_in_rank is not None else ()):
        for name, shape in stand_in_shapes(index, group, dims.hidden_size, stand_in_rank or 0).items():
            tensors[name] = torch.randn(shape, generator=more) * 0.1
    config = FluxMoEConfig(
        dims=dims, ffns=ffns, groups=groups, gate=gate, top_k=2, router=capacity or TOP_K_ROUTER,
        stand_in_rank=stand_in_rank,
        adaln_rank=compressed["adaln_in.weight"].shape[0] if compressed else None,
        split_only=not mean and not compressed,
        teacher=Teacher(title="tiny", sha256="0" * 64, licence="none"),
    )  # fmt: skip
    tensors["d2m_config"] = config_tensor(config.to_json())
    return tensors


def capacity_tensors(
    ffn: str, dims: FluxDims, layout: FFNLayout, router: CapacityRouter, generator: torch.Generator
) -> dict[str, Tensor]:
    """A predictor whose logits are about normal, and thresholds near which a share of them lies."""
    h, d, n = dims.hidden_size, router.width, layout.experts

    def random(*shape: int, gain: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * gain

    passes = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - router.capacity / n))
    return {
        f"{ffn}.capacity.in_layer.weight": random(d, h, gain=2 * h**-0.5),
        f"{ffn}.capacity.in_layer.bias": random(d, gain=0.1),
        f"{ffn}.capacity.out_layer.weight": random(n, d, gain=d**-0.5),
        f"{ffn}.capacity.out_layer.bias": random(n, gain=0.1),
        f"{ffn}.capacity.scale": 1 + torch.rand(1, generator=generator),
        f"{ffn}.threshold": (passes + random(n, gain=0.1)).sigmoid(),
    }


def config_tensor(json: str) -> Tensor:
    return torch.frombuffer(bytearray(json.encode()), dtype=torch.uint8)


def save(tensors: dict[str, Tensor], file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write; floating-point tensors in `dtype`, but what routes, means and U in float32."""

    def written(key: str, tensor: Tensor) -> Tensor:
        cast = tensor.is_floating_point() and not any(part in key for part in KEPT)
        return (tensor.to(dtype) if cast else tensor).contiguous()

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: written(key, tensor) for key, tensor in tensors.items()}, file)
    return file

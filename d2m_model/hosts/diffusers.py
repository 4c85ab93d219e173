"""FLUX.1 in diffusers: filled from and read back into BFL tensors, dense or as a FLUX-MoE.

Importing this module needs no diffusers. Shapes: H hidden size, S neurons of the shared expert, O modulation outputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint import CONFIG_KEY, check_file, config_tensor
from ..config import FluxDims, FluxMoEConfig
from ..keys import HEAD, diffusers_sources, from_diffusers, swap_halves
from ..layout import ffn_tensors
from ..moe import FusedFFN, MoEFFN
from ..teacher import open_teacher
from ..tensor_file import CheckpointError, TensorFile

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

AXES = (16, 56, 56)  # rotary channels of (index, row, column)


def new_transformer(dims: FluxDims) -> FluxTransformer2DModel:
    """A FLUX.1 with these dimensions and diffusers' initial weights."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=dims.in_channels,
        out_channels=dims.out_channels,
        num_layers=dims.double_blocks,
        num_single_layers=dims.single_blocks,
        attention_head_dim=HEAD,
        num_attention_heads=dims.hidden_size // HEAD,
        joint_attention_dim=dims.context_size,
        pooled_projection_dim=dims.vector_size,
        guidance_embeds=dims.guidance_embed,
        axes_dims_rope=AXES,
    )


def dims_of_transformer(model: FluxTransformer2DModel) -> FluxDims:
    config = model.config
    return FluxDims(
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        in_channels=config.in_channels,
        out_channels=model.out_channels,
        context_size=config.joint_attention_dim,
        vector_size=config.pooled_projection_dim,
        guidance_embed=config.guidance_embeds,
    )


def load_transformer(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> FluxTransformer2DModel:
    """A dense FLUX.1 in any form that open_teacher reads, as diffusers' model; `dtype` None keeps what the teacher gives.

    Raises CheckpointError if the file is no dense FLUX.1. Nothing is held twice.
    """
    with open_teacher(path) as teacher:
        with torch.device("meta"):
            model = new_transformer(teacher.dims)
        _fill(model, teacher.dims, teacher.tensor, dtype, device)
    return model.eval()


def _fill(
    model: FluxTransformer2DModel,
    dims: FluxDims,
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    """Every dense parameter that the model has, from tensors of BFL names. `tensor` may raise KeyError for the others."""
    present = dict(model.named_parameters())
    for name, source in diffusers_sources(dims).items():
        if present.keys().isdisjoint(source.names):
            continue
        whole = tensor(name)
        if source.swap:
            whole = swap_halves(whole)
        # Of a converted linear1 only q, k and v are dense, and they come first.
        parts = [(part, rows) for part, rows in zip(source.names, source.rows, strict=True) if part in present]
        for (part, _), rows in zip(
            parts, whole[: sum(rows for _, rows in parts)].split([r for _, r in parts]), strict=True
        ):
            module, _, parameter = part.rpartition(".")
            value = torch.empty(rows.shape, dtype=dtype or rows.dtype, device=device).copy_(rows)
            setattr(model.get_submodule(module), parameter, nn.Parameter(value))


def state_dict_to_bfl(model: FluxTransformer2DModel) -> dict[str, Tensor]:
    """Every tensor of a dense FLUX.1 in BFL names, as dense_shapes lists them."""
    return from_diffusers(model.state_dict(), dims_of_transformer(model))


def ffn_linears(model: FluxTransformer2DModel) -> Iterator[tuple[str, nn.Linear, nn.Linear, int]]:
    """Every FFN of a dense FLUX.1: BFL name, up-projection, down-projection, column of `down` where its neurons begin."""
    for i, block in enumerate(model.transformer_blocks):
        for stream, ff in (("img_mlp", block.ff), ("txt_mlp", block.ff_context)):
            yield f"double_blocks.{i}.{stream}", ff.net[0].proj, ff.net[2], 0
    hidden_size = model.inner_dim
    for i, block in enumerate(model.single_transformer_blocks):
        yield f"single_blocks.{i}", block.proj_mlp, block.proj_out, hidden_size


# FLUX-MoE


class SingleExpertOut(nn.Module):
    """A single block's proj_out with its MLP routed: on [attention, normed input] instead of [attention, hidden].

    The block's own forward hands it that when its proj_mlp and act_mlp are identities.
    """

    def __init__(self, attention: nn.Linear, moe: MoEFFN) -> None:
        super().__init__()
        self.attention = attention  # without bias, which is the MLP's
        self.moe = moe

    def forward(self, both: Tensor) -> Tensor:
        attention, x = both.chunk(2, dim=-1)
        out: Tensor = self.attention(attention) + self.moe(x)
        return out


class CompressedModulation(nn.Module):
    """lin'(U silu(vec)) in place of lin(silu(vec)) (Sec. 4.1). U is the model's `adaln_in`, one for all of them."""

    def __init__(self, adaln_in: nn.Linear, weight_OA: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self._adaln_in = (adaln_in,)  # not a child: it belongs to the model
        self.weight, self.bias = nn.Parameter(weight_OA), nn.Parameter(bias_O)

    def forward(self, silu_vec: Tensor) -> Tensor:
        return nn.functional.linear(self._adaln_in[0](silu_vec), self.weight, self.bias)


def load_flux_moe(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[FluxTransformer2DModel, FluxMoEConfig]:
    """A FLUX-MoE file as diffusers' model, its FFNs routed, and its configuration; `dtype` None keeps the file's.

    Routers and expert means keep the file's dtypes. Raises CheckpointError for a file that is not one, or that has
    block groups or a capacity router.
    """
    config = check_file(path)
    if config.groups or config.capacity_router is not None:
        what = "block groups" if config.groups else "a capacity router"
        raise CheckpointError(f"{path}: has {what}, which this version does not run yet.")
    with TensorFile(path) as file:

        def read(name: str, keep_dtype: bool = False) -> Tensor:
            tensor = file.tensor(name)
            target = tensor.dtype if keep_dtype else dtype or tensor.dtype
            return torch.empty(tensor.shape, dtype=target, device=device).copy_(tensor)

        with torch.device("meta"):
            model = new_transformer(config.dims)
        if config.adaln_rank is not None:
            _compress_modulations(model, config.dims, read)
        for name in config.ffns:
            _route_ffn(model, config, name, read, frozenset(file.shapes))
        _fill(model, config.dims, file.tensor, dtype, device)
    return model.eval(), config


def _compress_modulations(model: FluxTransformer2DModel, dims: FluxDims, read: Callable[[str], Tensor]) -> None:
    weight_AH = read("adaln_in.weight")
    model.adaln_in = nn.Linear(dims.hidden_size, weight_AH.shape[0], bias=False, device="meta")
    model.adaln_in.weight = nn.Parameter(weight_AH)
    for name, source in diffusers_sources(dims).items():
        if name.endswith(("_mod.lin.weight", ".modulation.lin.weight")):
            owner, _, attribute = source.names[0].removesuffix(".weight").rpartition(".")
            bias = read(name.removesuffix("weight") + "bias")
            setattr(model.get_submodule(owner), attribute, CompressedModulation(model.adaln_in, read(name), bias))


def _route_ffn(
    model: FluxTransformer2DModel, config: FluxMoEConfig, name: str, read: Callable[..., Tensor], stored: frozenset[str]
) -> None:
    hidden_size, layout, at = config.dims.hidden_size, config.ffns[name], ffn_tensors(name, config.dims.hidden_size)
    down_HN = read(f"{at.down}.weight")
    optional = {
        key: read(f"{name}.{key}", keep_dtype=True) if f"{name}.{key}" in stored else None
        for key in ("router.bias", "expert_mean")
    }
    fused = FusedFFN(
        up_weight_NH=read(f"{at.up}.weight")[at.first_row :],
        up_bias_N=read(f"{at.up}.bias")[at.first_row :],
        down_weight_HN=down_HN[:, at.first_column :],
        down_bias_H=read(f"{at.down}.bias"),
        router_weight_EH=read(f"{name}.router.weight", keep_dtype=True),
        router_bias_E=optional["router.bias"],
        expert_mean_EH=optional["expert_mean"],
    )
    moe = MoEFFN(fused, layout=layout, gate=config.gate, top_k=config.top_k)
    moe.register_buffer("neuron_order", read(f"{name}.neuron_order", keep_dtype=True))
    kind, index, *stream = name.split(".")
    if kind == "double_blocks":
        setattr(model.transformer_blocks[int(index)], "ff" if stream[0] == "img_mlp" else "ff_context", moe)
        return
    block = model.single_transformer_blocks[int(index)]
    attention = nn.Linear(hidden_size, hidden_size, bias=False, device="meta")
    attention.weight = nn.Parameter(down_HN[:, :hidden_size].contiguous())
    block.proj_mlp, block.act_mlp, block.proj_out = nn.Identity(), nn.Identity(), SingleExpertOut(attention, moe)


def state_dict_of_flux_moe(model: FluxTransformer2DModel, config: FluxMoEConfig) -> dict[str, Tensor]:
    """Every tensor of a FLUX-MoE file from a model that load_flux_moe has made, `d2m_config` among them."""
    present = model.state_dict()
    tensors: dict[str, Tensor] = {}
    partly: dict[str, Tensor] = {}  # of a converted linear1, q, k and v
    for name, source in diffusers_sources(config.dims).items():
        found = [present[part] for part in source.names if part in present]
        if len(found) == len(source.names):
            whole = torch.cat(found) if len(found) > 1 else found[0]
            tensors[name] = swap_halves(whole) if source.swap else whole
        elif found:
            partly[name] = torch.cat(found)
    if config.adaln_rank is not None:
        tensors["adaln_in.weight"] = model.adaln_in.weight.detach()
    for name in config.ffns:
        at, owner = ffn_tensors(name, config.dims.hidden_size), _owner(model, name)
        moe = owner.moe if isinstance(owner, SingleExpertOut) else owner
        assert isinstance(moe, MoEFFN)
        fused = moe.fused()
        tensors[f"{at.down}.weight"], tensors[f"{at.down}.bias"] = fused.down_weight_HN, fused.down_bias_H
        for kind, up in (("weight", fused.up_weight_NH), ("bias", fused.up_bias_N)):
            key = f"{at.up}.{kind}"
            tensors[key] = torch.cat([partly[key], up]) if key in partly else up
        if isinstance(owner, SingleExpertOut):
            tensors[f"{at.down}.weight"] = torch.cat([owner.attention.weight.detach(), fused.down_weight_HN], 1)
        tensors[f"{name}.router.weight"] = fused.router_weight_EH
        tensors[f"{name}.neuron_order"] = moe.get_buffer("neuron_order")
        for key, tensor in (("router.bias", fused.router_bias_E), ("expert_mean", fused.expert_mean_EH)):
            if tensor is not None:
                tensors[f"{name}.{key}"] = tensor
    return tensors | {CONFIG_KEY: config_tensor(config)}


def _owner(model: FluxTransformer2DModel, name: str) -> nn.Module:
    """The MoEFFN of a double block's stream, or a single block's SingleExpertOut."""
    kind, index, *stream = name.split(".")
    if kind == "single_blocks":
        found: nn.Module = model.single_transformer_blocks[int(index)].proj_out
        return found
    block = model.transformer_blocks[int(index)]
    return block.ff if stream[0] == "img_mlp" else block.ff_context


def experts_of(model: FluxTransformer2DModel) -> list[MoEFFN]:
    """The routed FFNs of a model that load_flux_moe has made; set `top_k` and `gate` on them."""
    return [module for module in model.modules() if isinstance(module, MoEFFN)]

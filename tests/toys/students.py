"""A small dense FLUX and FLUX-MoE students of it, random, that take the emoji data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from d2m_model.checkpoint import expected_tensors
from d2m_model.config import BlockGroup, FFNLayout, FluxMoEConfig, Gate, Teacher, all_ffn_names
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, untrained_transformer
from d2m_model.hosts.diffusers.tensors import load_tensors
from d2m_model.routers import TOP_K_ROUTER, CapacityRouter
from tests.toys import files

DIMS = replace(files.DIMS, double_blocks=3, context_size=128, vector_size=128)
LAYOUT = FFNLayout(shared=128, experts=6, width=64)
GROUP = BlockGroup(kind="double", first=1, blocks=2, active=1, selection="topk")


def dense_flux(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return untrained_transformer(DIMS).eval().requires_grad_(False)


def student_config(*, capacity: bool = False, groups: bool = True) -> FluxMoEConfig:
    return FluxMoEConfig(
        dims=DIMS,
        ffns=dict.fromkeys(all_ffn_names(DIMS)[2:], LAYOUT),
        groups=(GROUP,) if groups else (),
        gate=Gate(mode="normalised", scale=2.0),
        top_k=2,
        adaln_rank=None,
        split_only=False,
        teacher=Teacher(title="Small FLUX", sha256="0" * 64, licence="Apache-2.0"),
        router=CapacityRouter(capacity=2.0, width=16) if capacity else TOP_K_ROUTER,
    )


def student(*, capacity: bool = False, groups: bool = True, seed: int = 1) -> FluxMoETransformer2DModel:
    torch.manual_seed(seed)
    return FluxMoETransformer2DModel(student_config(capacity=capacity, groups=groups))


def stored_tensors(config: FluxMoEConfig) -> Callable[[str], Tensor]:
    """Return a function that gives the tensors of a student's file, on the CPU, by name. Their values are arbitrary."""
    shapes = expected_tensors(config)
    return lambda name: torch.empty(shapes[name], dtype=torch.int32 if name.endswith("neuron_order") else torch.float32)


def student_on(device: torch.device, config: FluxMoEConfig) -> FluxMoETransformer2DModel:
    """Return a student that is loaded from its file onto `device`."""
    with torch.device("meta"):
        model = FluxMoETransformer2DModel(config)
    load_tensors(model, config, (), stored_tensors(config), torch.float32, device)
    return model


def inputs_on(device: torch.device, batch: int = 2, pixels: int = 16, tokens: int = 7) -> dict[str, Tensor]:
    """Return arguments of a student's forward pass. Their values are arbitrary."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    return {
        "hidden_states": empty(batch, pixels, DIMS.in_channels),
        "encoder_hidden_states": empty(batch, tokens, DIMS.context_size),
        "pooled_projections": empty(batch, DIMS.vector_size),
        "timestep": empty(batch),
        "guidance": empty(batch),
        "img_ids": empty(pixels, 3),
        "txt_ids": empty(tokens, 3),
    }

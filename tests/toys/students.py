"""A small dense FLUX and FLUX-MoE students of it, random, that take the emoji data."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel

from d2m_model.config import BlockGroup, FFNLayout, FluxMoEConfig, Gate, Teacher, all_ffn_names
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, untrained_transformer
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

"""Small FLUX-MoE files of every kind that the format has, and the dense FLUX they were split from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2m_model.config import BlockGroup
from d2m_model.routers import CapacityRouter
from tests.toys import files, teachers

DIMS = replace(teachers.DIMS, double_blocks=3, single_blocks=3)
GROUPS = (
    BlockGroup(kind="double", first=1, blocks=2, active=1, selection="topk"),
    BlockGroup(kind="single", first=0, blocks=3, active=2, selection="topk"),
)


@dataclass(kw_only=True, slots=True)
class Pair:
    """Two files: `moe` was split from `dense`."""

    dense: Path
    moe: Path


def save_pair(
    folder: Path,
    *,
    groups: tuple[BlockGroup, ...] = (),
    capacity: CapacityRouter | None = None,
    rank: int | None = None,
    mean: bool = False,
    stand_in_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """`rank`: modulations compressed, of a teacher that loses nothing by it."""
    dense = files.dense_flux(DIMS)
    compressed = None
    if rank is not None:
        dense, compressed = files.compressible(dense, rank, DIMS)
    moe = files.split(
        dense, DIMS, groups=groups, capacity=capacity, mean=mean, compressed=compressed, stand_in_rank=stand_in_rank
    )
    pair = Pair(dense=folder / "dense.safetensors", moe=folder / "moe.safetensors")
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in dense.items()}, pair.dense)
    save_file({name: t.to(dtype if name in dense else t.dtype).contiguous() for name, t in moe.items()}, pair.moe)
    return pair


def inputs(batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Return inputs for a FLUX of these sizes: 4 image tokens and 3 text tokens, different in every sample."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": normal(batch, 4, 64),
        "encoder_hidden_states": normal(batch, 3, 32),
        "pooled_projections": normal(batch, 48),
        "timestep": torch.rand(batch, generator=generator),
        "guidance": 1.5 + 3 * torch.rand(batch, generator=generator),
        "img_ids": torch.rand(4, 3, generator=generator).round(),
        "txt_ids": torch.zeros(3, 3),
    }


def velocity(model: torch.nn.Module, asked: dict[str, Any] | None = None, **more: Any) -> Tensor:
    found: Tensor = model(**(inputs() if asked is None else asked), **more, return_dict=False)[0]
    return found

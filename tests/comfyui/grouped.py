"""A small FLUX-MoE with block groups, and how tests ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.checkpoint import check_file
from d2m_model.config import BlockGroup
from demo.in_process import Comfy
from tests.toys import files

DEVICE = torch.device("cpu")
DIMS = replace(files.DIMS, double_blocks=4, single_blocks=6)
DOUBLES = BlockGroup(kind="double", first=1, blocks=3, active=1, selection="topk")
SINGLES = BlockGroup(kind="single", first=1, blocks=5, active=2, selection="topk")
GROUPS = (DOUBLES, SINGLES)  # as of preset S
BATCH = (4, 8, 8)
SEED = 7  # of routers by which samples choose differently, in BATCH and in `inputs`


@dataclass
class Grouped:
    """A FLUX-MoE with block groups and the same weights without: tensors, the file, MODELs."""

    tensors: dict[str, Tensor]
    file: Path
    moe: Any
    plain: Any
    teacher: Any


@pytest.fixture(scope="session")
def grouped(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Grouped:
    folder = tmp_path_factory.mktemp("grouped")
    dense = files.dense_flux(DIMS)
    tensors = files.split(dense, DIMS, groups=GROUPS, seed=SEED)
    file = files.save(tensors, folder / "grouped.safetensors")
    plain = host.load(files.save(files.split(dense, DIMS, seed=SEED), folder / "plain.safetensors"))
    return Grouped(tensors, file, host.load(file), plain, host.load(files.save(dense, folder / "dense.safetensors")))


@pytest.fixture
def watched(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Record every choice of blocks: for each block of the group, the samples that run it."""
    block_groups, seen = host.module("nodes.model.block_groups"), []
    samples_per_block = block_groups.samples_per_block

    def watching(routing: Any) -> Any:
        seen.append([column.nonzero().flatten().tolist() for column in routing.chosen_BM.T])
        return samples_per_block(routing)

    monkeypatch.setattr(block_groups, "samples_per_block", watching)
    return seen


def active(host: Comfy, model: Any, blocks: int | list[int]) -> Any:
    if isinstance(blocks, int):
        return host.control("D2MActiveBlocks", model, active_blocks=blocks)
    return host.control("D2MActiveBlocks", model, active_blocks=0, per_group=",".join(map(str, blocks)))


def with_groups(host: Comfy, grouped: Grouped, folder: Path, *groups: BlockGroup) -> Any:
    """The same weights and routers, other words in the file."""
    config = check_file(grouped.file)
    tensors = dict(grouped.tensors)
    tensors["d2m_config"] = files.config_tensor(replace(config, groups=groups).to_json())
    return host.load(files.save(tensors, folder / "others.safetensors"))


def evaluate(model: Any, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, **rest: Any) -> Tensor:
    """One evaluation of a batch, each sample with its own latent, timestep and prompt."""
    with torch.inference_mode():
        return model.model.apply_model(
            x, t, c_crossattn=context, y=pooled, guidance=torch.full_like(t, 3.5),
            transformer_options=model.model_options["transformer_options"], **rest,
        )  # fmt: skip


def inputs(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, context, pooled = (
        torch.randn(batch, *shape, generator=generator) for shape in ((16, 8, 8), (7, DIMS.context_size), (32,))
    )
    return x, torch.linspace(0.1, 0.9, batch), context, pooled


@pytest.fixture
def loaded() -> Iterator[Callable[[Any], Any]]:
    """Loads a MODEL for apply_model, until the end of the test."""
    models: list[Any] = []

    def load_it(model: Any) -> Any:
        model.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
        models.append(model)
        return model

    yield load_it
    for model in models:
        model.unpatch_model(DEVICE)

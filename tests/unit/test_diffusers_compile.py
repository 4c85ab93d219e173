"""torch.compile of a FLUX-MoE in diffusers: one graph serves every Top-K, capacity and number of active blocks.

Beyond torch's limit of recompilations (eight) a model runs uncompiled without a word; here that is an error.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.config import BlockGroup, all_ffn_names
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
from tests.toys.students import LAYOUT, student_config

BATCH, PIXELS, TOKENS = 3, 16, 7
BACKEND = "eager"


pytestmark = pytest.mark.usefixtures("counters")


def small_model(*, capacity: bool = False, groups: bool = False) -> FluxMoETransformer2DModel:
    """A model with one double and one single block, or with a group of two single blocks."""
    config = student_config(capacity=capacity, groups=False)
    dims = replace(config.dims, double_blocks=1, single_blocks=2 if groups else 1)
    group = BlockGroup(kind="single", first=0, blocks=2, active=1, selection="topk")
    config = replace(
        config, dims=dims, ffns=dict.fromkeys(all_ffn_names(dims), LAYOUT), groups=(group,) if groups else ()
    )
    torch.manual_seed(1)
    return FluxMoETransformer2DModel(config).eval()


def evaluate(model: Any) -> Tensor:
    dims, generator = model.flux_moe.dims, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        output: Tensor = model(
            hidden_states=normal(BATCH, PIXELS, dims.in_channels),
            encoder_hidden_states=normal(BATCH, TOKENS, dims.context_size),
            pooled_projections=normal(BATCH, dims.vector_size),
            timestep=torch.rand(BATCH, generator=generator),
            guidance=torch.full((BATCH,), 3.5),
            img_ids=torch.zeros(PIXELS, 3),
            txt_ids=torch.zeros(TOKENS, 3),
        ).sample
    return output


@pytest.mark.parametrize("capacity", [False, True], ids=["top-k", "capacity"])
def test_one_graph_serves_every_value_of_the_router(capacity: bool, counters: Any) -> None:
    eager = small_model(capacity=capacity)
    model = copy.deepcopy(eager)
    compiled: Any = torch.compile(model, backend=BACKEND, fullgraph=True)
    outputs = []
    for value in (2, 0, 1, 3, LAYOUT.experts, 4):
        for each in (eager, model):
            each.set_capacity_factor(value) if capacity else each.set_top_k(value)
        outputs.append(evaluate(eager))
        torch.testing.assert_close(evaluate(compiled), outputs[-1])
    assert counters["stats"]["unique_graphs"] == 1
    assert not torch.equal(outputs[0], outputs[1])  # values do something


@pytest.mark.slow
def test_block_groups_make_no_more_graphs_than_their_samples(counters: Any) -> None:
    """Only how many samples run a block is new to a graph."""
    eager = small_model(groups=True)
    model = copy.deepcopy(eager)
    compiled: Any = torch.compile(model, backend=BACKEND)

    def agree(top_k: int, active: int) -> None:
        for each in (eager, model):
            each.set_top_k(top_k)
            each.block_routers()[0].active = active
        torch.testing.assert_close(evaluate(compiled), evaluate(eager))

    for active in (1, 2):
        agree(2, active)
    graphs = counters["stats"]["unique_graphs"]
    for top_k in (0, LAYOUT.experts, 1):
        for active in (0, 2, 1):
            agree(top_k, active)
    assert counters["stats"]["unique_graphs"] == graphs

"""Parameters and FLOPs: as the tensors are, as the paper prints them; and the report that shows them."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d2m_model import cost
from d2m_model.checkpoint import CONFIG_KEY, expected_tensors
from d2m_model.config import (
    BlockGroup,
    FFNLayout,
    FluxDims,
    FluxMoEConfig,
    Gate,
    PresetName,
    Teacher,
    adaln_rank_of,
    preset_groups,
    preset_layouts,
)
from d2m_model.cost import DENSE, Conversion, Cost, Tokens, flux
from d2m_model.keys import dense_shapes
from d2m_model.routers import TOP_K_ROUTER, CapacityRouter, TokenRouter
from d2m_train.__main__ import main
from d2m_train.commands.report import MEGAPIXEL, PRINTED, preset_costs
from d2m_train.teacher.known_flux import EMOJI_FLUX, FLUX_DEV

PRESETS: list[PresetName] = ["L", "M", "S", "XS"]


def converted(
    preset: PresetName,
    dims: FluxDims,
    *,
    adaln: bool = True,
    top_k: int = 2,
    router: TokenRouter = TOP_K_ROUTER,
) -> Conversion:
    return Conversion(
        ffns=preset_layouts(dims),
        groups=preset_groups(preset, dims),
        adaln_rank=adaln_rank_of(dims.hidden_size) if adaln else None,
        experts_per_token=top_k,
        router=router,
    )


# Against the tensors


@pytest.mark.parametrize("dims", [FLUX_DEV, EMOJI_FLUX])
def test_total_of_a_dense_flux_is_what_its_tensors_hold(dims: FluxDims) -> None:
    dense = flux(dims, DENSE, MEGAPIXEL)
    assert dense.total == dense.touched == sum(map(prod, dense_shapes(dims).values()))


@pytest.mark.parametrize("router", [TOP_K_ROUTER, CapacityRouter(capacity=2)])
@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_total_of_a_flux_moe_is_what_its_file_holds(preset: PresetName, adaln: bool, router: TokenRouter) -> None:
    conversion = converted(preset, FLUX_DEV, adaln=adaln, router=router)
    config = FluxMoEConfig(
        dims=FLUX_DEV,
        ffns=dict(conversion.ffns),
        groups=tuple(conversion.groups),
        gate=Gate(mode="sum", scale=1.0),
        top_k=2,
        adaln_rank=conversion.adaln_rank,
        router=router,
        split_only=False,
        teacher=Teacher(title="", sha256="", licence=""),
    )
    shapes = expected_tensors(config)
    held = sum(prod(s) for name, s in shapes.items() if name != CONFIG_KEY and not name.endswith("neuron_order"))
    assert flux(FLUX_DEV, conversion, MEGAPIXEL).total == held


# Against the paper


def test_flux_dev_has_11_9_billion_parameters() -> None:
    assert flux(FLUX_DEV, DENSE, MEGAPIXEL).total == pytest.approx(11.90e9, rel=5e-4)


@pytest.mark.parametrize(
    ("preset", "paper", "ratio"),
    [("L", 5.13e9, 0.684), ("M", 4.00e9, 0.567), ("S", 3.18e9, 0.427), ("XS", 2.63e9, 0.333)],
)
def test_presets_cost_what_the_method_says(preset: PresetName, paper: float, ratio: float) -> None:
    dense, moe = flux(FLUX_DEV, DENSE, MEGAPIXEL), flux(FLUX_DEV, converted(preset, FLUX_DEV), MEGAPIXEL)
    assert moe.total == pytest.approx(8.94e9, rel=1e-3)
    assert moe.paper == pytest.approx(paper, rel=2e-3)
    assert moe.flops / dense.flops == pytest.approx(ratio, rel=2e-3)


@pytest.mark.parametrize("preset", ["dense", *PRESETS])
def test_paper_count_is_within_half_a_percent_of_table_1(preset: str) -> None:
    costs = preset_costs(FLUX_DEV, MEGAPIXEL, PRESETS, top_k=2)
    assert costs[preset].paper == pytest.approx(PRINTED[preset].activated * 1e9, rel=5e-3)


# By hand


DIMS = FluxDims(
    hidden_size=128,
    double_blocks=1,
    single_blocks=2,
    in_channels=64,
    out_channels=64,
    context_size=32,
    vector_size=48,
    guidance_embed=False,
)
LAYOUT = FFNLayout(shared=128, experts=12, width=32)


def test_flops_of_an_ffn_are_those_torch_counts() -> None:
    dense = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
    with FlopCounterMode(display=False) as counter:
        dense(torch.randn(7, 128))
    assert cost.ffn(128, None, 0, tokens=7).flops == counter.get_total_flops()


@pytest.mark.parametrize("top_k", [0, 1, 2, 12])
def test_a_moe_ffn_runs_its_shared_expert_its_router_and_top_k_experts(top_k: int) -> None:
    found = cost.ffn(128, LAYOUT, top_k, tokens=7)
    neurons = 128 + 32 * top_k
    assert found.touched == pytest.approx(2 * 128 * neurons + neurons + 128 + 12 * 128)
    assert found.flops == pytest.approx(7 * 2 * (2 * 128 * neurons + 12 * 128))
    assert found.total == 2 * 128 * 512 + 512 + 128 + 12 * 128


def test_a_capacity_router_adds_its_predictor_on_every_token() -> None:
    plain, found = (
        cost.ffn(128, LAYOUT, 2.5, 7, router) for router in (TOP_K_ROUTER, CapacityRouter(capacity=2.5, width=16))
    )
    with FlopCounterMode(display=False) as counter:
        nn.Sequential(nn.Linear(128, 16), nn.SiLU(), nn.Linear(16, 12))(torch.randn(7, 128))
    assert found.flops - plain.flops == counter.get_total_flops()
    held = 128 * 16 + 16 + 16 * 12 + 12 + 12 + 1
    assert found.total - plain.total == held
    assert found.touched - plain.touched == pytest.approx(held)


def test_a_group_runs_its_active_blocks_and_its_routers() -> None:
    tokens = Tokens(image=16, text=4)
    group = BlockGroup(kind="single", first=0, blocks=2, active=1, selection="topk")
    plain = flux(DIMS, DENSE, tokens)
    grouped = flux(DIMS, Conversion(ffns={}, groups=(group,), adaln_rank=None, experts_per_token=0), tokens)
    block, routers = cost.single_block(DIMS, 0, DENSE, tokens), 2 * 2 * 128
    assert grouped.total == plain.total + routers
    assert grouped.touched == plain.touched - block.touched + routers
    assert grouped.flops == plain.flops - block.flops + 2 * routers


def test_attention_grows_with_the_square_of_the_tokens() -> None:
    assert cost.attention(128, Tokens(image=16, text=4)) == Cost(flops=4 * 20 * 20 * 128)


def test_compressed_modulation_has_one_shared_projection() -> None:
    plain = flux(DIMS, DENSE, MEGAPIXEL)
    compressed = flux(DIMS, Conversion(ffns={}, groups=(), adaln_rank=11, experts_per_token=0), MEGAPIXEL)
    outputs = (2 * 6 + 2 * 3) * 128  # of one double and two single blocks
    assert plain.total - compressed.total == outputs * (128 - 11) - 11 * 128


# Report


def test_report_prints_every_preset_beside_the_papers_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["L"] == ["8.95", "5.64", "5.14", "50.91", "0.684", "5.15", "0.658"]
    assert rows["XS"] == ["8.95", "2.86", "2.63", "24.81", "0.334", "2.64", "0.307"]
    assert list(rows)[-5:] == ["dense", *PRESETS]


def test_report_leaves_the_papers_figures_out_where_they_do_not_belong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--model", "emoji"], ["--top-k", "4"], ["--image-tokens", "1024"]):
        assert main(["report", *arguments]) == 0
        assert "paper:" not in capsys.readouterr().out


def test_report_as_json_is_one_object_for_a_preset_and_a_list_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--preset", "M", "--model", "emoji", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["preset"], one["model"]) == ("M", "emoji")
    assert one["total_params"] > one["touched_params"] > one["paper_params"] > 0
    assert 0 < one["flops_ratio"] < 1
    assert main(["report", "--model", "emoji", "--json"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert [row["preset"] for row in every] == PRESETS
    assert every[1] == one


def test_report_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--top-k", "13"]) == 2
    assert "--top-k is 13; expected 0 to 12" in capsys.readouterr().err
    assert main(["report", "--model", "no-such-file.safetensors"]) == 2
    assert "no-such-file.safetensors" in capsys.readouterr().err

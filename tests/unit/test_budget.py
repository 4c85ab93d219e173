"""Allotment of a compute budget: against brute force on small models, and its promises on a whole FLUX.1."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from d2m_model.budget import Allotment, Spending, allot, everything, falling_hull, one_value
from d2m_model.config import (
    BlockGroup,
    FFNLayout,
    FluxDims,
    FluxMoEConfig,
    Gate,
    Teacher,
    preset_groups,
    preset_layouts,
)
from d2m_model.cost import DENSE, Conversion, Tokens, flux
from d2m_model.routers import TOP_K_ROUTER, CapacityRouter, TokenRouter
from d2m_model.sensitivity import Errors, Sensitivity
from d2m_train.teacher.known_flux import EMOJI_FLUX

TOKENS = Tokens(image=64, text=12)
SMALL = FluxDims(
    hidden_size=128, double_blocks=1, single_blocks=1, in_channels=64, out_channels=64,
    context_size=64, vector_size=32, guidance_embed=True,
)  # fmt: skip


def config(
    dims: FluxDims = EMOJI_FLUX,
    groups: tuple[BlockGroup, ...] = (),
    layouts: dict[str, FFNLayout] | None = None,
    router: TokenRouter = TOP_K_ROUTER,
) -> FluxMoEConfig:
    return FluxMoEConfig(
        dims=dims, ffns=layouts or preset_layouts(dims), groups=groups, gate=Gate(mode="sum", scale=1.0), top_k=2,
        adaln_rank=None, split_only=False, teacher=Teacher(title="t", sha256="0" * 64, licence="none"), router=router,
    )  # fmt: skip


def table(of: FluxMoEConfig, levels: tuple[float, ...] = (1, 0.8, 0.5, 0), seed: int = 0) -> Sensitivity:
    """A table of random errors, most of them falling with k, as measured ones do."""
    draw, bins = random.Random(seed), len(levels) - 1

    def errors(most: int) -> Errors:
        return tuple(tuple(draw.random() * 2.0 ** -(k * draw.random()) for k in range(most + 1)) for _ in range(bins))

    return Sensitivity(
        levels=levels, image_tokens=TOKENS.image, text_tokens=TOKENS.text, samples=1, data="random",
        ffns={name: errors(layout.experts) for name, layout in of.ffns.items()},
        groups=tuple(errors(group.blocks) for group in of.groups),
    )  # fmt: skip


def shares(of: FluxMoEConfig, spending: Spending) -> float:
    """FLOPs of a step as a share of the dense model's, by the cost readout's own count."""
    conversion = Conversion.of(of, active_blocks=spending.active_blocks, experts_by_ffn=spending.top_k)
    return flux(of.dims, conversion, TOKENS).flops / flux(of.dims, DENSE, TOKENS).flops


def error(sensitivity: Sensitivity, spendings: tuple[Spending, ...]) -> float:
    total = 0.0
    for number, spending in enumerate(spendings):
        width = sensitivity.levels[number] - sensitivity.levels[number + 1]
        total += width**2 * sum(sensitivity.ffns[name][number][k] for name, k in spending.top_k.items())
    return total


# Against brute force


@pytest.mark.parametrize("seed", range(6))
def test_no_other_allotment_of_the_same_cost_has_less_error(seed: int) -> None:
    small = config(
        SMALL,
        layouts=dict.fromkeys(
            ("double_blocks.0.txt_mlp", "single_blocks.0"), FFNLayout(shared=128, experts=3, width=128)
        ),
    )
    sensitivity = table(small, levels=(1, 0.6, 0), seed=seed)
    names = list(small.ffns)
    all_of_them = [
        tuple(Spending(top_k=dict(zip(names, ks, strict=True)), active_blocks=[]) for ks in (chosen[:2], chosen[2:]))
        for chosen in itertools.product(range(4), repeat=4)
    ]
    costs = [sum(shares(small, part) for part in parts) / 2 for parts in all_of_them]
    for budget in (0.5, 0.6, 0.7, 0.8, 0.9):
        made = allot(small, sensitivity, budget, TOKENS)
        best = min(
            error(sensitivity, parts)
            for parts, cost in zip(all_of_them, costs, strict=True)
            if cost <= made.share + 1e-9
        )
        assert error(sensitivity, made.spendings) == pytest.approx(best)


def test_the_hull_passes_over_steps_that_gain_nothing() -> None:
    assert falling_hull([5, 5, 2, 1.9, 3, 1.9]) == [(0, 5), (2, 2), (3, 1.9)]
    assert falling_hull([1, 2, 3]) == [(0, 1)]


# Promises


@pytest.mark.parametrize("preset", ["L", "M", "XS"])
def test_a_budget_is_never_exceeded_and_a_larger_one_takes_nothing_away(preset: str) -> None:
    moe = config(groups=preset_groups(preset, EMOJI_FLUX))  # type: ignore[arg-type]
    sensitivity, before = table(moe), None
    for percent in range(30, 101, 10):
        made = allot(moe, sensitivity, percent / 100, TOKENS)
        assert made.share <= max(percent / 100, shares(moe, made.spendings[0])) + 1e-9
        least = Spending(top_k=dict.fromkeys(moe.ffns, 0), active_blocks=[0] * len(moe.groups))
        assert percent == 100 or made.share <= max(percent / 100, shares(moe, least)) + 1e-9
        assert made.share == pytest.approx(sum(shares(moe, part) for part in made.spendings) / 3)
        for part, earlier in zip(made.spendings, before.spendings if before else (), strict=False):
            assert all(k >= earlier.top_k[name] for name, k in part.top_k.items())
            assert all(a >= b for a, b in zip(part.active_blocks, earlier.active_blocks, strict=True))
        before = made
    assert before is not None
    assert all(part == everything(moe) for part in before.spendings)


def test_a_budget_is_spent_on_the_steps_that_the_run_has() -> None:
    moe = config()
    sensitivity = table(moe)
    late = allot(moe, sensitivity, 0.7, TOKENS, sigmas=(0.5, 0.3, 0.1, 0.0))
    assert len(late.spendings) == 1  # image to image begins below the first two bins
    assert late.share == pytest.approx(shares(moe, late.spendings[0]))
    assert late.at(0.5) == late.at(0.9) == late.spendings[0]
    whole = allot(moe, sensitivity, 0.7, TOKENS, sigmas=(1.0, 0.9, 0.8, 0.0))
    assert [whole.at(sigma) for sigma in (1.0, 0.9, 0.8)] == [*[whole.spendings[0]] * 2, whole.spendings[1]]
    mean = (2 * shares(moe, whole.spendings[0]) + shares(moe, whole.spendings[1])) / 3
    assert whole.share == pytest.approx(mean)
    assert mean <= 0.7


def test_experts_go_where_they_take_error_away() -> None:
    moe = config()
    flat = tuple(tuple([1e-9] * 13) for _ in range(3))
    steep = tuple(tuple(2.0**-k for k in range(13)) for _ in range(3))
    first, *others = moe.ffns
    sensitivity = replace(table(moe), ffns={first: steep, **dict.fromkeys(others, flat)})
    made = allot(moe, sensitivity, 0.9, TOKENS)
    assert {part.top_k[first] for part in made.spendings} == {12}
    assert {k for part in made.spendings for name, k in part.top_k.items() if name != first} == {0}


# Files without a table


@pytest.mark.parametrize("router", [TOP_K_ROUTER, CapacityRouter(capacity=2.0, width=8)])
def test_one_value_is_the_highest_whose_cost_fits(router: TokenRouter) -> None:
    moe = config(router=router)
    dense = flux(moe.dims, DENSE, TOKENS).flops
    step = 1 if router.whole else 0.05
    value = one_value(moe, 0.7, TOKENS)
    assert flux(moe.dims, Conversion.of(moe, value), TOKENS).flops <= 0.7 * dense
    assert flux(moe.dims, Conversion.of(moe, value + step), TOKENS).flops > 0.7 * dense
    assert one_value(moe, 0.01, TOKENS) == 0
    assert one_value(moe, 1, TOKENS) == (12 if router.whole else 8)


def test_an_allotment_covers_noise_levels_beyond_its_bins() -> None:
    high, low = (Spending(top_k={"f": k}, active_blocks=[]) for k in (3, 1))
    made = Allotment(lowest=(0.5, 0.1), spendings=(high, low), share=0.5)
    assert (made.at(1.2), made.at(0.5), made.at(0.0)) == (high, low, low)

"""Grouping of blocks, blocks that depth pruning keeps, and initial block routers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2m_model.blocks import Block, BlockKind
from d2m_model.config import BlockGroup, preset_groups
from d2m_model.conversion.block_routers import BlockChange, GroupObservations, plan_block_routers
from d2m_model.conversion.depth_pruning import kept_blocks, teacher_name
from d2m_model.conversion.groups import auto_groups, least_runs, parse_groups
from d2m_model.fields import ConfigError
from d2m_model.mob import route_blocks
from tests.toys.teachers import DIMS

DEEP = replace(DIMS, double_blocks=10, single_blocks=20)
GROUP = BlockGroup(kind="single", first=4, blocks=5, active=1, selection="topk")
FLAT = {block.name: BlockChange(mse=1.0, image_mse=1.0) for block in DEEP.blocks}


def changed(**image_mse: float) -> dict[str, BlockChange]:
    """Return changes of blocks named like double3: `image_mse` as given, and an `mse` that orders the blocks the other way."""
    change = dict(FLAT)
    for name, value in image_mse.items():
        kind: BlockKind = "double" if name.startswith("double") else "single"
        change[Block(kind, int(name[6:])).name] = BlockChange(mse=1 / value, image_mse=value)
    return change


# Groups


def test_groups_are_read_as_they_are_written() -> None:
    assert parse_groups(["double:4-6/2", " single:10-14"], 1, "window") == (
        BlockGroup(kind="double", first=4, blocks=3, active=2, selection="window"),
        BlockGroup(kind="single", first=10, blocks=5, active=1, selection="window"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("double:4", "'double:4' is not a block group; expected kind:first-last/active, such as double:4-6/1"),
        ("triple:1-2", "not a block group"),
        ("single:5-5/1", "'single:5-5/1' has 1 blocks; expected two or more"),
        ("single:5-4", "'single:5-4' has 0 blocks"),
    ],
)
def test_what_is_no_group_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_groups([text], 1, "topk")


@given(st.lists(st.integers(0, 20), min_size=4, max_size=9), st.integers(1, 3), st.integers(1, 3))
def test_no_other_placement_of_the_runs_costs_less(costs: list[int], runs: int, length: int) -> None:
    if runs * length > len(costs):
        with pytest.raises(ValueError, match="do not fit"):
            least_runs(costs, runs, length)
        return
    found = least_runs(costs, runs, length)

    def cost(begins: tuple[int, ...]) -> int:
        return sum(sum(costs[begin : begin + length]) for begin in begins)

    places = [
        begins
        for begins in combinations(range(len(costs) - length + 1), runs)
        if all(later - earlier >= length for earlier, later in pairwise(begins))
    ]
    assert tuple(found) in places
    assert cost(tuple(found)) == min(map(cost, places))


def test_auto_leaves_out_the_blocks_that_change_the_image_most() -> None:
    change = changed(double5=50.0, single7=40.0, single13=30.0)
    groups = auto_groups("XS", DEEP, change)
    given_groups = preset_groups("XS", DEEP)
    assert [(group.kind, group.blocks) for group in groups] == [(group.kind, group.blocks) for group in given_groups]
    grouped = [block.name for group in groups for block in group.members]
    assert len(set(grouped)) == len(grouped)
    assert not {"double_blocks.0", "double_blocks.1", "double_blocks.5", "single_blocks.7", "single_blocks.13"} & set(
        grouped
    )


# Depth pruning


def test_of_each_group_the_blocks_that_change_the_image_most_are_kept() -> None:
    groups = (
        BlockGroup(kind="double", first=2, blocks=3, active=1, selection="topk"),
        BlockGroup(kind="single", first=0, blocks=5, active=2, selection="topk"),
    )
    kept = kept_blocks(DEEP, groups, changed(double3=9.0, single4=5.0, single1=4.0))
    assert kept == {"double": [0, 1, 3, *range(5, 10)], "single": [1, 4, *range(5, 20)]}
    assert teacher_name("double_blocks.2.img_mlp", kept) == "double_blocks.3.img_mlp"
    assert teacher_name("single_blocks.1", kept) == "single_blocks.4"
    assert teacher_name("img_in.weight", kept) == "img_in.weight"


# Block routers


def observations(count: int, hidden: int = 24) -> GroupObservations:
    """The tokens decide which block matters; in some samples all matter more, which teaches the router nothing."""
    generator = torch.Generator().manual_seed(count)
    x_mean_nH, vec_nH = torch.randn(2, count, hidden, generator=generator)
    truth_MH = torch.randn(5, hidden, generator=torch.Generator().manual_seed(1))
    wanted_nM = (x_mean_nH @ truth_MH.T / hidden**0.5).mul(0.5).exp()
    return GroupObservations(
        x_mean_nH=100 * x_mean_nH,
        vec_nH=vec_nH,
        change_nM=wanted_nM * (3 * torch.rand(count, 1, generator=generator)).exp(),
    )


@pytest.mark.parametrize("group", [GROUP, replace(GROUP, active=2), replace(GROUP, active=2, selection="window")])
def test_routers_from_calibration_choose_the_blocks_that_change_most(group: BlockGroup) -> None:
    seen, fresh = observations(400), observations(200)
    routers, report = plan_block_routers("g", group, seen, "ridge", seed=0)
    assert report.oracle.agreement == 1
    assert report.ridge.agreement > 0.8 > report.random.agreement
    assert report.oracle.skipped <= report.ridge.skipped < report.fixed.skipped
    routing = route_blocks(fresh.x_mean_nH, fresh.vec_nH, routers.x_MH, routers.y_MH, group.active, group.selection)
    skipped = (fresh.change_nM * ~routing.chosen_BM).sum(1) / fresh.change_nM.sum(1)
    assert float(skipped.mean()) == pytest.approx(report.ridge.skipped, rel=0.1)  # what the report promised


def test_random_routers_are_reported_as_they_are_written() -> None:
    seen = observations(64)
    routers, report = plan_block_routers("g", GROUP, seen, "random", seed=3)
    again, _ = plan_block_routers("g", GROUP, seen, "random", seed=3)
    other, _ = plan_block_routers("h", GROUP, seen, "random", seed=3)
    assert report.converted == "random"
    assert torch.equal(routers.x_MH, again.x_MH)
    assert not torch.equal(routers.x_MH, other.x_MH)


def test_too_few_samples_for_block_routers_are_refused() -> None:
    with pytest.raises(ValueError, match="7 calibration samples; expected 8 or more"):
        plan_block_routers("g", GROUP, observations(7), "ridge", seed=0)

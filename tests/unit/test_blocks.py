"""Names and order of blocks and FFNs."""

from __future__ import annotations

import random

import pytest
from torch import nn

from d2m_model.blocks import FFN, Block, blocks_of
from d2m_model.config import BlockGroup
from d2m_model.keys import dense_shapes, diffusers_shapes
from tests.toys.teachers import DIMS


def test_blocks_and_ffns_sort_in_the_order_in_which_they_run() -> None:
    assert sorted(random.sample(DIMS.blocks, len(DIMS.blocks))) == DIMS.blocks
    assert sorted(random.sample(DIMS.ffns, len(DIMS.ffns))) == DIMS.ffns
    assert [ffn.name for ffn in DIMS.ffns][:2] == ["double_blocks.0.img_mlp", "double_blocks.0.txt_mlp"]
    assert DIMS.ffns[-1].name == f"single_blocks.{DIMS.single_blocks - 1}"


def test_names_in_both_styles_are_read_back() -> None:
    for block in DIMS.blocks:
        assert Block.parse(block.name) == Block.parse(block.diffusers_name) == block
        assert Block.parse(f"{block.name}.norm.query_norm.scale") == block
    for ffn in DIMS.ffns:
        assert FFN.parse(ffn.name) == ffn


@pytest.mark.parametrize(
    "name", ["img_in.weight", "double_blocks", "double_blocks.x", "block_groups.0", "3.single_blocks.1"]
)
def test_a_name_outside_of_blocks_has_no_block(name: str) -> None:
    assert Block.parse(name) is None


@pytest.mark.parametrize("name", ["double_blocks.0", "double_blocks.0.img_mlp.0", "single_blocks.0.linear1", "img_in"])
def test_a_name_of_no_ffn_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not an FFN's name; expected double_blocks\.i\.img_mlp"):
        FFN.parse(name)


def test_an_ffns_layers_are_tensors_of_flux_in_both_styles() -> None:
    bfl, diffusers = dense_shapes(DIMS), diffusers_shapes(DIMS)
    for ffn in DIMS.ffns:
        assert all(f"{layer}.weight" in bfl for layer in ffn.linears)
        assert all(f"{layer}.weight" in diffusers for layer in ffn.diffusers_linears)


def test_members_of_a_group_are_consecutive_blocks() -> None:
    group = BlockGroup(kind="single", first=4, blocks=3, active=1, selection="topk")
    assert group.members == [Block("single", 4), Block("single", 5), Block("single", 6)]


@pytest.mark.parametrize(
    "names", [("double_blocks", "single_blocks"), ("transformer_blocks", "single_transformer_blocks")]
)
def test_a_models_blocks_are_found_in_either_style(names: tuple[str, str]) -> None:
    model = nn.Module()
    for name, depth in zip(names, (1, 2), strict=True):
        model.add_module(name, nn.ModuleList(nn.Identity() for _ in range(depth)))
    blocks = blocks_of(model)
    assert list(blocks) == [Block("double", 0), Block("single", 0), Block("single", 1)]
    assert blocks[Block("single", 1)] is model.get_submodule(f"{names[1]}.1")

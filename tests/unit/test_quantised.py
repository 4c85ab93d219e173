"""How files tell of quantised weights."""

from __future__ import annotations

import json

import pytest

from d2m_model.quantised import HEADER_KEY, is_companion, quantisation_problems, quantised_layers
from d2m_model.tensor_file import CheckpointError

EXPECTED = {
    "single_blocks.0.linear1.weight": (),
    "single_blocks.0.router.weight": (),
    "block_groups.0.router_x.weight": (),
}


def test_layers_of_the_header_lose_their_prefix() -> None:
    layers = {"model.diffusion_model.img_in": {"format": "nvfp4"}, "txt_in": {"format": "float8_e4m3fn"}}
    assert quantised_layers({HEADER_KEY: json.dumps({"layers": layers})}) == {
        "img_in": {"format": "nvfp4"},
        "txt_in": {"format": "float8_e4m3fn"},
    }


def test_a_header_may_list_no_layers() -> None:
    assert quantised_layers({HEADER_KEY: "{}"}) == quantised_layers({}) == {}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "not JSON", '{"layers": []}', '{"layers": {"a": 5}}', '{"layers": {"a": {}}}', "[" * 10_000],
)
def test_a_list_of_another_form_is_called_damaged(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"_quantization_metadata in the header .* damaged"):
        quantised_layers({HEADER_KEY: text})


def test_companions_stand_beside_a_weight_that_is_expected() -> None:
    assert is_companion("single_blocks.0.linear1.weight_scale", EXPECTED)
    assert not is_companion("single_blocks.0.linear3.weight_scale", EXPECTED)
    assert not is_companion("single_blocks.0.linear1.weight", EXPECTED)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["single_blocks.0.linear1.comfy_quant", "single_blocks.0.linear1.weight_scale"], []),
        (["single_blocks.0.linear1.scale_weight"], []),
        (["single_blocks.0.linear1.comfy_quant"], ["single_blocks.0.linear1.weight_scale is missing"]),
        (["single_blocks.0.router.scale_weight"], ["single_blocks.0.router is quantised"]),
        (["block_groups.0.router_x.weight_scale"], ["block_groups.0.router_x is quantised"]),
    ],
)
def test_what_is_missing_or_must_not_be_is_named(names: list[str], found: list[str]) -> None:
    said = quantisation_problems(dict.fromkeys(names, ()), EXPECTED)
    assert len(said) == len(found)
    assert all(expected in text for expected, text in zip(found, said, strict=True))

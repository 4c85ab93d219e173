"""The sensitivity table in a file's provenance: what is written is read, and a wrong table is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from d2m_model.checkpoint import CONFIG_KEY, parse_config
from d2m_model.config import BlockGroup, FluxMoEConfig
from d2m_model.fields import ConfigError
from d2m_model.routers import CapacityRouter
from d2m_model.sensitivity import SENSITIVITY, Sensitivity
from d2m_train.commands import inspect
from tests.toys.files import dense_flux, split

MOE = parse_config(split(dense_flux())[CONFIG_KEY])
GROUP = BlockGroup(kind="single", first=0, blocks=3, active=1, selection="topk")


def config_with(change: dict[str, Any]) -> FluxMoEConfig:
    config = replace(MOE, groups=(GROUP,))
    table = Sensitivity(
        levels=(1.0, 0.5, 0.0), image_tokens=64, text_tokens=12, samples=8, data="emoji",
        ffns=dict.fromkeys(config.ffns, ((0.0123456,) * 13,) * 2), groups=(((3.0, 2.0, 1.0, 0.0),) * 2,),
    )  # fmt: skip
    return replace(config, provenance={**config.provenance, SENSITIVITY: table.entry() | change})


def test_a_table_comes_back_from_the_file_with_four_digits() -> None:
    config = config_with({})
    table = FluxMoEConfig.from_json(config.to_json()).sensitivity
    assert table is not None
    assert table.levels == (1.0, 0.5, 0.0)
    assert table.ffns == dict.fromkeys(config.ffns, ((0.01235,) * 13,) * 2)
    assert table.groups == (((3.0, 2.0, 1.0, 0.0),) * 2,)
    assert MOE.sensitivity is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"levels": [1.0, 0.5, 0.5, 0.0]}, "levels"),
        ({"levels": [1 - n / 9 for n in range(9)] + [0.0]}, "levels"),
        ({"levels": "1, 0"}, "levels"),
        ({"image_tokens": -1}, "image_tokens"),
        ({"samples": "many"}, "samples"),
        ({"ffns": {}}, "ffns"),
        ({"groups": []}, "groups"),
        ({"groups": [[[3, 2, 1], [3, 2, 1]]]}, "groups[0]"),
        ({"groups": [[[3, 2, 1, -1], [3, 2, 1, 0]]]}, "groups[0]"),
        ({"more": 1}, "more"),
    ],
)
def test_a_wrong_table_is_refused_by_the_name_of_its_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_with(change)
    assert f"provenance.sensitivity.{named} is" in str(caught.value)


def test_a_file_with_capacity_routers_has_no_table() -> None:
    with pytest.raises(ConfigError, match="none in a file that has a capacity router"):
        replace(config_with({}), router=CapacityRouter(capacity=2.0, width=8))


def test_inspect_tells_of_a_table_and_does_not_print_it() -> None:
    facts = {"moe": json.loads(config_with({}).to_json())}
    dims = facts["moe"].pop("dims")
    lines = inspect.facts_text(
        facts
        | {"dims": dims, "file": "f", "bytes": 1, "tensors": 1, "kind": "FLUX-MoE", "parameters": 1}
        | {"elements_by_dtype": {}, "activated_parameters": {"touched": 1, "paper": 1}}
    )
    assert "measured on 8 samples of emoji in each of 2 ranges of noise levels" in lines
    assert "0.01235" not in lines


def test_errors_that_are_no_numbers_are_refused() -> None:
    data = json.loads(config_with({}).to_json())
    name = next(iter(data["ffns"]))
    data["provenance"][SENSITIVITY]["ffns"][name][0][0] = True
    with pytest.raises(ConfigError, match="2 lists of 13 errors"):
        FluxMoEConfig.from_json(json.dumps(data))

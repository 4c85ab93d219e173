"""The configuration of a FLUX-MoE: presets as the paper has them, round trip, and refusals that name the field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_model.config import (
    SCHEMA_VERSION,
    BlockGroup,
    FFNLayout,
    FluxDims,
    FluxMoEConfig,
    Gate,
    PresetName,
    Teacher,
    adaln_rank_of,
    all_ffn_names,
    paper_layout,
    preset_groups,
    preset_layouts,
)
from d2m_model.fields import ConfigError
from d2m_model.routers import TOP_K_ROUTER, CapacityRouter
from d2m_train.teacher.known_flux import FLUX_DEV


def with_depth(double: int, single: int, hidden_size: int = 3072) -> FluxDims:
    return dataclasses.replace(FLUX_DEV, double_blocks=double, single_blocks=single, hidden_size=hidden_size)


def preset_config(preset: PresetName, dims: FluxDims) -> FluxMoEConfig:
    return FluxMoEConfig(
        dims=dims,
        ffns=preset_layouts(dims),
        groups=preset_groups(preset, dims),
        gate=Gate(mode="normalised", scale=2.0),
        top_k=2,
        adaln_rank=adaln_rank_of(dims.hidden_size),
        split_only=False,
        teacher=Teacher(title="FLUX.1 [dev]", sha256="0" * 64, licence="FLUX.1 [dev] Non-Commercial License"),
        provenance={"importance": "taylor", "seed": 0},
    )


# Presets


def test_paper_layout_is_one_shared_expert_of_h_and_twelve_of_a_quarter() -> None:
    layout = paper_layout(3072)
    assert (layout.shared, layout.experts, layout.width) == (3072, 12, 768)
    assert layout.neurons == FLUX_DEV.neurons == 12288


def test_every_ffn_but_those_of_the_first_three_double_blocks_is_converted_on_flux_dev() -> None:
    converted = preset_layouts(FLUX_DEV)
    dense = [name for name in all_ffn_names(FLUX_DEV) if name not in converted]
    assert dense == [f"double_blocks.{i}.{stream}_mlp" for i in range(3) for stream in ("img", "txt")]
    assert len(converted) == 2 * 16 + 38


@pytest.mark.parametrize(("preset", "doubles", "singles"), [("L", 0, 0), ("M", 5, 0), ("S", 5, 3), ("XS", 5, 5)])
def test_groups_of_flux_dev_are_the_papers(preset: PresetName, doubles: int, singles: int) -> None:
    groups = preset_groups(preset, FLUX_DEV)
    assert [group.blocks for group in groups if group.kind == "double"] == [3] * doubles
    assert [group.blocks for group in groups if group.kind == "single"] == [5] * singles
    assert all(group.active == 1 for group in groups)
    grouped = [i for g in groups if g.kind == "double" for i in range(g.first, g.first + g.blocks)]
    assert grouped == list(range(19 - 3 * doubles, 19))


@settings(max_examples=25)
@given(
    preset=st.sampled_from(["L", "M", "S", "XS"]),
    double=st.integers(4, 40),
    single=st.integers(5, 80),
    hidden_size=st.integers(1, 32).map(lambda n: 128 * n),
)
def test_presets_fit_every_depth_and_survive_json(
    preset: PresetName, double: int, single: int, hidden_size: int
) -> None:
    config = preset_config(preset, with_depth(double, single, hidden_size))  # checks layouts and groups itself
    assert FluxMoEConfig.from_json(config.to_json()) == config


def test_presets_that_a_shallow_flux_cannot_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="M needs 4 double blocks or more; this FLUX has 3"):
        preset_groups("M", with_depth(3, 38))
    with pytest.raises(ConfigError, match="S needs 5 single blocks or more; this FLUX has 4"):
        preset_groups("S", with_depth(19, 4))


# Refusals


CONFIG = preset_config("XS", with_depth(4, 10, 128))
LAYOUT = FFNLayout(shared=128, experts=12, width=32)


def test_the_sample_is_sound_with_either_router() -> None:
    capacity = dataclasses.replace(CONFIG, router=CapacityRouter(capacity=2.5))
    for config in (CONFIG, capacity):
        assert FluxMoEConfig.from_json(config.to_json().encode()) == config
    assert json.loads(CONFIG.to_json())["capacity_router"] is None
    assert json.loads(capacity.to_json())["capacity_router"] == {"capacity": 2.5, "width": 128}


def group(**changes: Any) -> BlockGroup:
    return BlockGroup(**({"kind": "single", "first": 0, "blocks": 5, "active": 1, "selection": "topk"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffns": {"double_blocks.4.img_mlp": LAYOUT}}, r"ffns is 'double_blocks.4.img_mlp'.*4 double"),
        ({"ffns": {"single_blocks.0": dataclasses.replace(LAYOUT, width=31)}}, r"128 \+ 12 x 31 neurons.*= 512"),
        ({"ffns": {"single_blocks.0": dataclasses.replace(LAYOUT, shared=-64, experts=18)}}, "shared"),
        ({"top_k": 13}, "top_k is 13; expected 0 to 12"),
        ({"top_k": -1}, "top_k is -1"),
        ({"gate": Gate(mode="normalised", scale=0.0)}, "gate.scale is 0.0; expected a positive number"),
        ({"gate": Gate(mode="mean", scale=1.0)}, "gate.mode is 'mean'"),  # type: ignore[arg-type]
        ({"router": CapacityRouter(capacity=0)}, "capacity_router.capacity is 0; expected above 0, up to 12"),
        ({"router": CapacityRouter(capacity=12.5)}, "capacity is 12.5; expected above 0, up to 12"),
        ({"router": CapacityRouter(capacity=float("nan"))}, "capacity is nan"),
        ({"router": CapacityRouter(capacity=2, width=0)}, "capacity_router.width is 0; expected 1 or more"),
        ({"groups": (group(first=6),)}, r"groups\[0\].*within the 10 single blocks"),
        ({"groups": (group(kind="double", first=2, blocks=3),)}, r"groups\[0\].*within the 4 double blocks"),
        ({"groups": (group(blocks=1),)}, r"groups\[0\].*two or more"),
        ({"groups": (group(active=6),)}, r"groups\[0\].active is 6; expected 0 to 5"),
        ({"groups": (group(), group(first=4))}, r"groups\[1\].*no other group"),
        ({"schema_version": 0}, "schema_version is 0"),
        ({"schema_version": SCHEMA_VERSION + 1}, f"schema {SCHEMA_VERSION + 1}.*Update ComfyUI-Dense2MoE"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(CONFIG.to_json())
    edit(data)
    return json.dumps(data)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.pop("gate"), "d2m_config.gate is 'missing'"),
        (lambda data: data["dims"].pop("vector_size"), "dims.vector_size is 'missing'"),
        (lambda data: data.update(colour="red"), "d2m_config.colour is 'red'; expected no such field"),
        (lambda data: data.update(top_k="2"), "top_k is '2'; expected int"),
        (lambda data: data.update(top_k=True), "top_k is True; expected int"),
        (lambda data: data.update(split_only=1), "split_only is 1; expected bool"),
        (lambda data: data.update(dims=None), "dims is None; expected an object"),
        (lambda data: data.update(ffns=[]), r"ffns is \[\]; expected an object"),
        (lambda data: data["groups"][0].update(blocks=2.5), r"groups\[0\].blocks is 2.5; expected int"),
        (lambda data: data.update(groups=None), "groups is None; expected a list"),
        (lambda data: data.pop("capacity_router"), "capacity_router is 'missing'"),
        (lambda data: data.update(capacity_router={"capacity": 2}), "capacity_router.width is 'missing'"),
        (lambda data: data.update(capacity_router={"capacity": "2", "width": 8}), "capacity is '2'; expected float"),
        (lambda data: data.update(capacity_router={"capacity": 2, "width": 8, "k": 1}), "capacity_router.k is 1"),
        (lambda data: data.update(provenance=None), "provenance is None; expected an object"),
        (lambda data: data["dims"].update(double_blocks=0), "dims.double_blocks is 0"),
        (lambda data: data.update(adaln_rank=0), "adaln_rank is 0"),
        (lambda data: data["groups"][0].update(selection="best"), r"groups\[0\].selection is 'best'"),
        (
            lambda data: data["dims"].update(single_blocks=2**31 - 1),
            "single_blocks is 2147483647; expected 1000 at most",
        ),
        (lambda data: data["gate"].update(scale=float("inf")), "Infinity, which is no number of JSON"),
        (lambda data: data.update(adaln_rank=10**100), "whole number of 101 digits"),
        (lambda data: data["teacher"].update(title="\ud800"), "half of a surrogate pair"),
        (lambda data: data["provenance"].update(baked=5), "provenance.baked is 5; expected a list"),
        (lambda data: data["provenance"].update(teacher_outputs={"double": [1, 0]}), "rising numbers of blocks"),
        (lambda data: data["provenance"].update(note=nested(500)), "nested more than"),
    ],
)
def test_json_that_is_no_config_is_refused_by_name(edit: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FluxMoEConfig.from_json(edited(edit))


def test_a_newer_schema_is_told_apart_from_a_broken_file() -> None:
    text = json.dumps({"schema_version": SCHEMA_VERSION + 1, "fields": "of the future"})
    with pytest.raises(ConfigError, match=f"schema {SCHEMA_VERSION + 1}.*Update"):
        FluxMoEConfig.from_json(text)


def test_text_that_is_not_json_is_called_damaged() -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        FluxMoEConfig.from_json(b"\x00\x01{")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**6) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(data=st.data(), value=JSON_VALUES)
def test_any_value_in_any_place_is_a_config_or_a_config_error(data: st.DataObject, value: Any) -> None:
    """A damaged file reaches the user as a message, never as a traceback."""
    router = data.draw(st.sampled_from([TOP_K_ROUTER, CapacityRouter(capacity=2)]))
    whole = json.loads(dataclasses.replace(CONFIG, router=router).to_json())
    place: Any = whole
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        config = FluxMoEConfig.from_json(json.dumps(whole))
    except ConfigError:
        return
    assert FluxMoEConfig.from_json(config.to_json()).to_json() == config.to_json()

"""The Budget node: what each evaluation runs, what the image's log has of it, and its company with other controls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_model.budget import allot
from d2m_model.checkpoint import CONFIG_KEY, config_tensor, parse_config
from d2m_model.config import BlockGroup, FluxMoEConfig
from d2m_model.cost import DENSE, Conversion, Tokens, flux
from d2m_model.routers import CapacityRouter
from d2m_model.sensitivity import SENSITIVITY, Errors, Sensitivity
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair, with_lora
from tests.comfyui.test_trace import traced
from tests.toys import files
from tests.toys.compare import distance

SMALL = (1, 8, 8)  # 16 image tokens
TOKENS = Tokens(image=16, text=5)
GROUP = BlockGroup(kind="single", first=0, blocks=3, active=1, selection="topk")


def table(config: FluxMoEConfig) -> Sensitivity:
    """Errors that fall with k, from FFN to FFN and bin to bin at other rates."""

    def errors(most: int, rate: float) -> Errors:
        return tuple(tuple(2.0 ** -(rate * k * (1 + bin_)) for k in range(most + 1)) for bin_ in range(2))

    return Sensitivity(
        levels=(1.0, 0.7, 0.0), image_tokens=16, text_tokens=5, samples=1, data="made up",
        ffns={name: errors(12, 0.1 * (1 + place)) for place, name in enumerate(config.ffns)},
        groups=tuple(errors(group.blocks, 2) for group in config.groups),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(host: Comfy, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """MODELs whose files have a table, with and without block groups."""
    folder, models = tmp_path_factory.mktemp("measured"), {}
    for name, groups in (("experts", ()), ("groups", (GROUP,))):
        tensors = files.split(pair.dense, groups=groups)
        config = parse_config(tensors[CONFIG_KEY])
        config = replace(config, provenance={SENSITIVITY: table(config).entry()})
        models[name] = host.load(
            files.save(tensors | {CONFIG_KEY: config_tensor(config)}, folder / f"{name}.safetensors")
        )
    return models


def budget(host: Comfy, model: Any, share: float, **more: Any) -> Any:
    return host.control("D2MBudget", model, budget=share, **more)


def logged(host: Comfy, model: Any, **more: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """The latents, and the log of the run."""
    latents = host.sample(model, SMALL, **more)
    live = host.module("nodes.controls.live_values")
    return latents, live.LIVE.last_runs()[0]


@pytest.mark.parametrize("kind", ["experts", "groups"])
def test_each_evaluation_runs_what_the_budget_allots(host: Comfy, measured: dict[str, Any], kind: str) -> None:
    model = measured[kind]
    config = model.model.moe_config
    _, log = logged(host, budget(host, model, 0.7), steps=4)
    sigmas = [entry["sigma"] for entry in log["evaluations"]]
    expected = allot(config, table(config), 0.7, TOKENS, [*sigmas, 0.0])
    shares = []
    for entry in log["evaluations"]:
        spending = expected.at(entry["sigma"])
        assert log["allotments"][entry["allotment"]] == spending.top_k
        assert entry.get("active_blocks", []) == spending.active_blocks
        assert "top_k" not in entry
        conversion = Conversion.of(config, active_blocks=spending.active_blocks, experts_by_ffn=spending.top_k)
        shares.append(flux(config.dims, conversion, TOKENS).flops / flux(config.dims, DENSE, TOKENS).flops)
    assert len({json.dumps(entry) for entry in log["allotments"]}) == 2
    assert sum(shares) / 4 <= 0.7


def test_an_ffn_runs_with_its_own_number_of_experts(host: Comfy, measured: dict[str, Any]) -> None:
    """Where the allotment gives all FFNs alike, it is a Top-K; else it is none."""
    model = measured["experts"]
    by_ffn = dict.fromkeys(model.model.moe_config.ffns, 3)
    alike = host.sample(host.with_settings(model, top_k_by_ffn=by_ffn), SMALL)
    assert torch.equal(alike, host.sample(host.top_k(model, 3), SMALL))
    for name in by_ffn:
        one = host.sample(host.with_settings(model, top_k_by_ffn={**by_ffn, name: 0}), SMALL)
        assert distance(one, alike) >= 1e-4


def test_a_full_budget_runs_everything(host: Comfy, measured: dict[str, Any]) -> None:
    model = measured["groups"]
    every = host.control("D2MActiveBlocks", host.top_k(model, 12), active_blocks=3)
    assert torch.equal(host.sample(budget(host, model, 1.0), SMALL), host.sample(every, SMALL))


def test_later_controls_replace_a_budget_and_a_budget_earlier_ones(host: Comfy, measured: dict[str, Any]) -> None:
    model = measured["experts"]
    under = budget(host, model, 0.7)
    assert torch.equal(host.sample(host.top_k(under, 2), SMALL), host.sample(host.top_k(model, 2), SMALL))
    assert torch.equal(host.sample(budget(host, host.top_k(model, 2), 0.7), SMALL), host.sample(under, SMALL))
    pieces = host.control("D2MSchedule", under, setting="top_k", unit="percent", pieces="0 - 100: 2")
    assert torch.equal(host.sample(pieces, SMALL), host.sample(host.top_k(model, 2), SMALL))


def test_a_budget_with_a_mask_and_a_lora_replays(host: Comfy, measured: dict[str, Any]) -> None:
    model = with_lora(measured["experts"])
    made = host.control("D2MExpertMask", budget(host, model, 0.7), mask="single_blocks.*: 1=0")
    latents, log = logged(host, made)
    assert distance(latents, host.sample(budget(host, model, 0.7), SMALL)) >= 1e-4
    again = host.control("D2MReplay", model, log=json.dumps(log))
    assert torch.equal(host.sample(again, SMALL), latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"allotments": [{"single_blocks.0": 3}]}, "allotment for 1 FFNs"), ({"allotments": []}, "has allotment 0 of 0"),
     ({"allotments": [{"single_blocks.0": -1}]}, "numbers of experts by FFN"), ({"allotments": 1}, "has no evaluations")],
)  # fmt: skip
def test_a_log_with_a_wrong_allotment_is_refused(
    host: Comfy, measured: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    log = {"evaluations": [{"evaluation": 0, "sigma": 1.0, "allotment": 0}]} | change
    with pytest.raises(ValueError, match=message):
        host.control("D2MReplay", measured["experts"], log=json.dumps(log))


@pytest.mark.parametrize("router", [None, CapacityRouter(capacity=2.0, width=16)])
def test_a_file_without_a_table_gets_one_value_and_says_so(
    host: Comfy, pair: Pair, router: CapacityRouter | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = host.load(files.save(files.split(pair.dense, capacity=router), tmp_path / "file.safetensors"))
    _, log = logged(host, budget(host, model, 0.9))
    assert "has no sensitivity table" in caplog.text
    setting = "top_k" if router is None else "capacity"
    values = {entry[setting] for entry in log["evaluations"]}
    assert len(values) == 1
    assert values.pop() > 0
    assert not log["allotments"]


def test_the_cost_of_a_budget_is_that_of_its_allotment(host: Comfy, measured: dict[str, Any]) -> None:
    cost = host.module("nodes.cost")
    config = measured["groups"].model.moe_config
    report = cost.cost_report(config, {"budget": "0.7", "width": "64", "height": "64"})
    assert report["flops_ratio"] == pytest.approx(allot(config, table(config), 0.7, TOKENS).share)
    assert report["flops_ratio"] <= 0.7
    bare = replace(config, provenance={})
    assert "no sensitivity table" in cost.cost_report(bare, {"budget": "0.7"})["text"]
    with pytest.raises(cost.RequestError, match="budget is '2'"):
        cost.cost_report(config, {"budget": "2"})


def test_a_trace_has_the_allotment_of_each_step(host: Comfy, measured: dict[str, Any]) -> None:
    shown = traced(host, budget(host, measured["experts"], 0.7))
    _, log = logged(host, shown.model)
    trace = shown.trace
    seen = set()
    for number, entry in enumerate(log["evaluations"]):
        by_ffn = log["allotments"][entry["allotment"]]
        assert trace.steps[number].settings["top_k_by_ffn"] == by_ffn
        for ffn, k in by_ffn.items():
            layer = trace.choices(number, trace.samples[0])[ffn]
            assert (layer.experts_TK != 255).sum(1).tolist() == [k] * len(layer.experts_TK)
            seen.add(k)
    assert len(seen) > 1
    title = (
        host.module("nodes.expert_map.map_node")._make_panel(trace, trace.samples[0], None, 0, "single_blocks.0").title
    )
    assert f"top_k {log['allotments'][log['evaluations'][0]['allotment']]['single_blocks.0']}" in title

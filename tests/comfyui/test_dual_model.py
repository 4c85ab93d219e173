"""Guiders with a model of their own for negative prompts (ComfyUI's Dual Model CFG Guider): each model's settings hold
for its evaluations, and for no other model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.checkpoint import check_state_dict
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import Grouped
from tests.comfyui.test_live import Desk, at_step, desk, graph_of, of_log  # noqa: F401 (fixtures)
from tests.comfyui.test_trace import traced
from tests.toys import files
from tests.toys.compare import distance

SIZE = (1, 16, 8, 8)
Dual = Callable[..., Tensor]


def guider_class() -> Any:
    """ComfyUI's, or in a ComfyUI that does not have it yet the same."""
    import comfy.sampler_helpers
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler

    if hasattr(nodes_custom_sampler, "Guider_DualModel"):
        return nodes_custom_sampler.Guider_DualModel

    class DualModel(comfy.samplers.CFGGuider):
        def __init__(self, model_patcher: Any, uncond_model_patcher: Any) -> None:
            super().__init__(model_patcher)
            self.uncond_model_patcher = uncond_model_patcher

        def outer_sample(self, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            other, negative = self.uncond_model_patcher, [dict(it) for it in self.conds["negative"]]
            self.inner, conds, loaded = comfy.sampler_helpers.prepare_sampling(
                other, noise.shape, {"negative": negative}, other.model_options
            )
            self.negative = conds["negative"]
            other.pre_run()
            try:
                return super().outer_sample(noise, *args, **kwargs)
            finally:
                other.cleanup()
                comfy.sampler_helpers.cleanup_models(conds, loaded)

        def inner_sample(self, noise: Tensor, latent: Tensor, device: Any, sampler: Any, sigmas: Tensor, mask: Any,
                         callback: Any, disable_pbar: bool, seed: int, **kwargs: Any) -> Tensor:  # fmt: skip
            conds = {"negative": self.negative}
            found = comfy.samplers.process_conds(self.inner, noise, conds, device, latent, mask, seed, **kwargs)
            self.processed = found["negative"]
            return super().inner_sample(
                noise, latent, device, sampler, sigmas, mask, callback, disable_pbar, seed, **kwargs
            )

        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any, seed: Any = None) -> Tensor:
            calls = ((self.inner_model, self.conds["positive"]), (self.inner, self.processed))
            cond, uncond = (comfy.samplers.calc_cond_batch(model, [prompts], x, timestep, model_options)[0]
                            for model, prompts in calls)  # fmt: skip
            return comfy.samplers.cfg_function(
                self.inner_model, cond, uncond, self.cfg, x, timestep, model_options=model_options,
                cond=self.conds["positive"], uncond=self.processed,
            )  # fmt: skip

    return DualModel


@pytest.fixture
def dual(host: Comfy) -> Dual:
    """Samples with two models."""
    import comfy.samplers

    def sample(model: Any, negative: Any, steps: int = 3, sampler: str = "euler", callback: Any = None) -> Tensor:
        guider = guider_class()(model, negative)
        guider.set_conds(host.conditioning(model, 1), host.conditioning(model, 2))
        guider.set_cfg(4.0)
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
        found: Tensor = guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, callback=callback, seed=0
        )
        return found

    return sample


@pytest.fixture
def with_top_k(host: Comfy, pair: Pair, tmp_path: Path) -> Callable[[int], Any]:
    """The same FLUX-MoE from a file that has this Top-K as its own: nothing has to travel."""

    def make(top_k: int) -> Any:
        config = replace(check_state_dict(pair.split), top_k=top_k)
        tensors = {**pair.split, "d2m_config": files.config_tensor(config.to_json())}
        return host.load(files.save(tensors, tmp_path / f"{top_k}.safetensors"))

    return make


def test_each_model_has_its_own_settings(host: Comfy, pair: Pair, dual: Dual, with_top_k: Callable[[int], Any]) -> None:
    """Also where one of them, or the guider's, has none; with the same weights and with another file's."""
    own, other = with_top_k(2), with_top_k(7)
    expected = dual(own, other)
    assert distance(expected, dual(own, own)) >= 1e-3
    for same in (own, pair.moe):  # the guider's model, and a file beside it
        assert torch.equal(dual(host.top_k(own, 2), host.top_k(same, 7)), expected)
        assert torch.equal(dual(own, host.top_k(same, 7)), expected)
    assert torch.equal(dual(host.top_k(other, 2), other), expected)
    assert torch.equal(dual(host.top_k(pair.moe, 2), other), expected)


def test_beside_a_dense_flux_too(host: Comfy, pair: Pair, dual: Dual, with_top_k: Callable[[int], Any]) -> None:
    assert torch.equal(dual(pair.teacher, host.top_k(pair.moe, 7)), dual(pair.teacher, with_top_k(7)))
    assert torch.equal(dual(host.top_k(pair.moe, 7), pair.teacher), dual(with_top_k(7), pair.teacher))


def test_a_file_that_could_not_follow_the_other_is_not_asked_to(
    host: Comfy, pair: Pair, grouped: Grouped, dual: Dual
) -> None:
    """Blocks of a FLUX-MoE with block groups, a mask of one with other FFNs."""
    blocks = host.control("D2MActiveBlocks", grouped.moe, active_blocks=2)
    mask = host.control("D2MExpertMask", pair.moe, mask="double_blocks.1.*: 0=0")
    assert torch.isfinite(dual(blocks, mask)).all()
    assert torch.equal(dual(mask, grouped.moe), dual(mask, active_as_in_file(host, grouped)))
    assert distance(dual(mask, grouped.moe), dual(mask, blocks)) >= 1e-3


def active_as_in_file(host: Comfy, grouped: Grouped) -> Any:
    groups = grouped.moe.model.diffusion_model.config.groups
    per_group = ",".join(str(group.active) for group in groups)
    return host.control("D2MActiveBlocks", grouped.moe, active_blocks=0, per_group=per_group)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2s_ancestral"])
@pytest.mark.parametrize("controlled", [False, True], ids=["alone", "beside controls of the guider's"])
def test_a_schedule_of_the_negative_model_goes_its_own_way(
    host: Comfy,
    pair: Pair,
    desk: Desk,  # noqa: F811
    dual: Dual,
    sampler: str,
    controlled: bool,
) -> None:
    model = host.control("D2MTopK", pair.moe, node="k", top_k=5, gate="sum") if controlled else pair.moe
    widgets = {"setting": "top_k", "unit": "sigma", "pieces": "1 - 0.8: 6"}
    negative = host.control("D2MSchedule", pair.moe, node="s", **widgets)
    with desk.executing("a", graph_of(k="D2MTopK", s="D2MSchedule")) as log:
        dual(model, negative, sampler=sampler)
    *mains, run = log
    assert run["model"] == "negative"
    assert run["controls"] == ["s"]
    sigmas = of_log(log, "sigma")
    assert of_log(log, "top_k") == [6 if sigma > 0.8 else 2 for sigma in sigmas]
    assert len(sigmas) == (3 if sigma_once(sampler) else 5)
    assert len(mains) == controlled
    for main in mains:
        assert [entry["sigma"] for entry in main["evaluations"]] == sigmas
        assert {entry["top_k"] for entry in main["evaluations"]} == {5}


def sigma_once(sampler: str) -> bool:
    return sampler == "euler"


def test_a_live_value_of_the_negative_model_replays(
    host: Comfy,
    pair: Pair,
    desk: Desk,  # noqa: F811
    dual: Dual,
    at_step: Callable,  # noqa: F811
) -> None:
    model = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum")
    negative = host.control("D2MTopK", pair.moe, node="n", top_k=2, gate="sum")
    move = at_step({1: lambda: desk.live.apply(["n"], {"top_k": 7}, None)})
    with desk.executing("a", graph_of(k="D2MTopK", n="D2MTopK")) as log:
        expected = dual(model, negative, steps=4, callback=move)
    assert [of_log(log, "top_k", run) for run in range(2)] == [[2] * 4, [2, 2, 7, 7]]
    with pytest.raises(ValueError, match=r"1 \(node sampler, 4 evaluations\), 2 \(node sampler, negative model, 4 "):
        host.control("D2MReplay", pair.moe, log=json.dumps(log))
    again = (host.control("D2MReplay", pair.moe, log=json.dumps(log), run=run) for run in (1, 2))
    assert torch.equal(dual(*again, steps=4), expected)


@pytest.mark.parametrize("same", [True, False], ids=["the same weights", "another file"])
def test_a_trace_listens_to_the_guiders_model(
    host: Comfy, pair: Pair, grouped: Grouped, dual: Dual, same: bool
) -> None:
    """And says nothing of another file's routers."""
    model = host.top_k(pair.moe, 3)
    negative = host.top_k(pair.moe, 7) if same else host.control("D2MActiveBlocks", grouped.moe, active_blocks=1)
    traced, handle = host.execute("D2MTraceRouting", model=model).result
    assert torch.equal(dual(traced, negative), dual(model, negative))
    trace = host.module("nodes.expert_map.trace_store").STORE._stored[handle.runs[-1]].trace
    slots = [[entry.slots for entry in step.entries] for step in trace.steps]
    routed = len(pair.moe.model.diffusion_model.config.ffns)
    assert slots == [[3] * routed + [7] * routed * same] * 3


def test_a_trace_is_of_its_own_file(host: Comfy, pair: Pair, grouped: Grouped, dual: Dual) -> None:
    """Choices of another file's routers, for negative prompts, are not recorded as the traced model's."""
    for negative, conditions in ((pair.moe, {"positive", "negative"}), (grouped.moe, {"positive"})):
        it = traced(host, pair.moe)
        dual(it.model, negative)
        assert {key.condition for step in it.trace.steps for key in step.places()} == conditions

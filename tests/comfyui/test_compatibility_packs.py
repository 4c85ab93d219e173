"""Beside other packs no setting is lost without a word: it reaches the blocks, or a message says why it cannot."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import Grouped, active
from tests.comfyui.test_live import Desk, at_step, desk, graph_of, of_log  # noqa: F401 (fixtures)
from tests.toys import files
from tests.toys.compare import distance

SIZE = (2, 8, 8)
Patch = Callable[[Any], Any]


@pytest.fixture(scope="module")
def packs(host: Comfy) -> ModuleType:
    return importlib.import_module("tests.comfyui.packs")  # which imports ComfyUI


@pytest.fixture(params=["loop_replaced_while_called", "loop_of_an_object_patch"])
def own_loop(request: pytest.FixtureRequest, packs: ModuleType) -> Patch:
    patch: Patch = getattr(packs, request.param)
    return patch


def test_settings_reach_blocks_that_are_called_without_options(host: Comfy, pair: Pair, own_loop: Patch) -> None:
    mask = {"double_blocks.1.img_mlp": torch.linspace(0, 2, files.LAYOUT.experts)}
    for settings in ({}, {"top_k": 0}, {"top_k": 3, "gate": "normalised"}, {"top_k": 5, "mask": mask}):
        model = host.with_settings(pair.moe, **settings)
        assert distance(host.sample(own_loop(model), SIZE, steps=1), host.sample(model, SIZE, steps=1)) <= 1e-6
    images = [host.sample(own_loop(host.top_k(pair.moe, k)), SIZE, steps=1) for k in (0, 2, files.LAYOUT.experts)]
    assert min(distance(images[1], other) for other in (images[0], images[2])) >= 1e-3


def test_active_blocks_reach_blocks_that_are_called_without_options(
    host: Comfy, grouped: Grouped, own_loop: Patch
) -> None:
    for blocks in (0, 1, [2, 3]):
        model = active(host, grouped.moe, blocks)
        assert distance(host.sample(own_loop(model), SIZE, steps=2), host.sample(model, SIZE, steps=2)) <= 1e-6


def test_a_trace_hears_blocks_that_are_called_without_options(host: Comfy, grouped: Grouped, own_loop: Patch) -> None:
    store = host.module("nodes.expert_map.trace_store").STORE
    traces = []
    for patch in (own_loop, lambda model: model):
        model, handle = host.execute("D2MTraceRouting", model=active(host, grouped.moe, [1, 3])).result
        host.sample(patch(model), SIZE, steps=2)
        traces.append(store._stored[handle.runs[-1]].trace)
    found, expected = ([step.buffer for step in trace.steps] for trace in traces)
    assert all(map(np.array_equal, found, expected))
    assert [step.settings for step in traces[0].steps] == [step.settings for step in traces[1].steps]


def test_settings_do_not_outlast_their_evaluation(host: Comfy, pair: Pair) -> None:
    """A block that is called outside of the model runs as the file says."""
    block = pair.moe.model.diffusion_model.single_blocks[0]
    x, vec = torch.randn(1, 10, 128), torch.randn(1, 128)
    common = {"vec": vec, "pe": pair.moe.model.diffusion_model.pe_embedder(torch.zeros(1, 10, 3))}
    expected = block(x.clone(), **common)
    host.sample(host.top_k(pair.moe, 0), SIZE, steps=1)
    assert torch.equal(block(x.clone(), **common), expected)


def test_options_are_found_by_position_too(host: Comfy, pair: Pair) -> None:
    flux = pair.moe.model.diffusion_model
    x, vec, pe = torch.randn(1, 10, 128), torch.randn(1, 128), flux.pe_embedder(torch.zeros(1, 10, 3))
    options = {"d2m": {"top_k": 0}}
    single, double = flux.single_blocks[0], flux.double_blocks[1]
    by_name = single(x.clone(), vec, pe, transformer_options=options)
    assert torch.equal(single(x.clone(), vec, pe, None, None, options), by_name)
    by_name = double(x[:, :6].clone(), x[:, 6:].clone(), vec, pe, transformer_options=options)
    by_position = double(x[:, :6].clone(), x[:, 6:].clone(), vec, pe, None, None, None, options)
    assert all(map(torch.equal, by_position, by_name))


def test_an_exchanged_single_block_is_named(host: Comfy, pair: Pair, packs: ModuleType) -> None:
    block = pair.moe.model.diffusion_model.single_blocks[1]
    with (
        packs.exchanged_class(block, packs.ForeignSingle),
        pytest.raises(RuntimeError, match=r"single_blocks\.1 .* ForeignSingle \(of tests\.comfyui\.packs\).* anew"),
    ):
        host.sample(pair.moe, SIZE, steps=1)
    host.sample(pair.moe, SIZE, steps=1)


def test_a_foreign_forward_that_uses_experts_as_a_dense_layer_is_named(
    host: Comfy, pair: Pair, packs: ModuleType
) -> None:
    block = pair.moe.model.diffusion_model.single_blocks[1]
    block.forward = MethodType(packs.foreign_forward, block)
    try:
        with pytest.raises(RuntimeError, match=r"uses single_blocks\.1\.linear1 .* dense"):
            host.sample(pair.moe, SIZE, steps=1)
    finally:
        del block.forward


def test_an_exchanged_double_block_keeps_the_settings_of_its_ffns(host: Comfy, pair: Pair, packs: ModuleType) -> None:
    block, model = pair.moe.model.diffusion_model.double_blocks[1], host.top_k(pair.moe, 3)
    expected = host.sample(model, SIZE, steps=1)
    with packs.exchanged_class(block, packs.ForeignDouble):
        found = host.sample(model, SIZE, steps=1)
    assert distance(found, expected) <= 1e-6


def test_an_exchanged_block_of_a_group_is_named(host: Comfy, grouped: Grouped, packs: ModuleType) -> None:
    block = grouped.moe.model.diffusion_model.double_blocks[1]
    with packs.exchanged_class(block, packs.ForeignDouble), pytest.raises(RuntimeError, match=r"double_blocks\.1 "):
        host.sample(grouped.moe, SIZE, steps=1)


def test_context_windows_paint_under_settings_as_without(host: Comfy, pair: Pair, packs: ModuleType) -> None:
    """Their wrapper of the preparation reads the options by name."""

    def windows(model: Any) -> Any:
        return packs.context_windows(model, dim=2, length=4, overlap=2)

    size = (1, 8, 8)
    expected = host.sample(windows(host.with_settings(pair.moe, top_k=3)), size, steps=1)
    assert distance(host.sample(windows(host.top_k(pair.moe, 3)), size, steps=1), expected) <= 1e-6
    assert distance(host.sample(host.top_k(windows(pair.moe), 3), size, steps=1), expected) <= 1e-6


def test_a_trace_of_windows_within_the_image_says_so(host: Comfy, pair: Pair, packs: ModuleType) -> None:
    model, handle = host.execute("D2MTraceRouting", model=packs.context_windows(pair.moe, 2, 4, 2)).result
    latent = {"samples": host.sample(model, (1, 8, 8), steps=1)}
    with pytest.raises(
        ValueError, match=r"nothing of the positive prompt\. Parts of the image .* windows.* has: nothing"
    ):
        host.run(
            "D2MExpertMap", trace=handle, latent=latent, step=-1, block=-1, prompt="positive", opacity=1.0, numbers=False,
            legend=False,
        )  # fmt: skip


def test_a_trace_of_windows_over_the_batch_knows_the_images(host: Comfy, pair: Pair, packs: ModuleType) -> None:
    store, traces = host.module("nodes.expert_map.trace_store").STORE, []
    for model in (pair.moe, packs.context_windows(pair.moe, dim=0, length=2, overlap=0)):
        traced, handle = host.execute("D2MTraceRouting", model=model).result
        host.sample(traced, (4, 4, 4), steps=1)
        traces.append(store._stored[handle.runs[-1]].trace)
    whole, windows = traces
    assert [key.image for key in windows.samples] == [0, 1, 2, 3]
    for key in windows.samples:
        found, expected = windows.choices(0, key), whole.choices(0, key)
        assert all(np.array_equal(found[ffn].experts_TK, expected[ffn].experts_TK) for ffn in whole.layers)


def test_wrappers_hand_arguments_on_as_they_came(host: Comfy, pair: Pair) -> None:
    """Another pack's wrapper before ours may pass them by name, and one behind ours may read them so."""
    from comfy.patcher_extension import WrappersMP

    behind: dict[str, set[str]] = {}

    def by_name(kind: str, names: tuple[str, ...]) -> None:
        def before(executor: Any, *args: Any, **kwargs: Any) -> Any:
            return executor(**dict(zip(names, args, strict=False)), **kwargs)

        def after(executor: Any, *args: Any, **kwargs: Any) -> Any:
            assert not args
            behind[kind] = set(kwargs)
            return executor(**kwargs)

        # ComfyUI calls the wrapper that was added first first.
        model.add_wrapper_with_key(kind, "before", before)
        for key in ("d2m", "d2m_trace"):
            for own in list(model.get_wrappers(kind, key)):
                model.remove_wrappers_with_key(kind, key)
                model.add_wrapper_with_key(kind, key, own)
        model.add_wrapper_with_key(kind, "after", after)

    model, handle = host.execute("D2MTraceRouting", model=host.top_k(pair.moe, 3)).result
    expected = host.sample(model, SIZE, steps=1)
    by_name(WrappersMP.PREDICT_NOISE, ("x", "timestep", "model_options", "seed"))
    by_name(WrappersMP.APPLY_MODEL, ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options"))
    assert torch.equal(host.sample(model, SIZE, steps=1), expected)
    assert behind[WrappersMP.PREDICT_NOISE] == {"x", "timestep", "model_options", "seed"}
    assert "transformer_options" in behind[WrappersMP.APPLY_MODEL]
    assert len(handle.runs) == 2


def test_live_values_log_and_replay_hold_where_options_are_missing(
    host: Comfy,
    pair: Pair,
    own_loop: Patch,
    desk: Desk,  # noqa: F811
    at_step: Callable,  # noqa: F811
) -> None:
    model = host.control("D2MTopK", pair.moe, node="k", top_k=2, gate="sum")
    images, logs = [], []
    for patch in (own_loop, lambda model: model):
        move = at_step({0: lambda: desk.live.apply(["k"], {"top_k": 9}, None)})
        with desk.executing(f"prompt {len(images)}", graph_of(k="D2MTopK")) as log:
            images.append(host.sample(patch(model), SIZE, steps=3, callback=move))
        logs.append(log)
    assert of_log(logs[0], "top_k") == of_log(logs[1], "top_k") == [2, 9, 9]
    assert distance(images[0], images[1]) <= 1e-6
    replayed = host.control("D2MReplay", pair.moe, log=json.dumps(logs[0]))
    assert distance(host.sample(own_loop(replayed), SIZE, steps=3), images[0]) <= 1e-6


def test_an_exchanged_class_of_the_transformer_keeps_the_settings(
    host: Comfy, pair: Pair, grouped: Grouped, packs: ModuleType
) -> None:
    from comfy.ldm.flux.model import Flux

    for model in (host.top_k(pair.moe, 3), active(host, grouped.moe, [1, 3])):
        expected = host.sample(model, SIZE, steps=1)
        with packs.exchanged_class(model.model.diffusion_model, Flux):
            assert distance(host.sample(model, SIZE, steps=1), expected) <= 1e-6

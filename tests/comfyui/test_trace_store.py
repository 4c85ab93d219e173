"""The traces that the server holds for Expert Maps: which run is shown, what is freed, how many there are."""

from __future__ import annotations

import gc
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import BATCH, GROUPS, Grouped
from tests.comfyui.map_runs import drawn, hidden, image_of, run
from tests.comfyui.test_trace import sample


def test_a_map_that_shows_the_same_trace_again_keeps_its_id(host: Comfy, pair: Pair, store: Any) -> None:
    it, latents = run(host, pair.moe, store)
    ids = [
        drawn(host, trace=it.handle, image=image_of(latents), step=step).ui["d2m_map"][0]["traces"] for step in (0, 1)
    ]
    other = drawn(host, "8", trace=it.handle, image=image_of(latents)).ui["d2m_map"][0]["traces"]
    assert ids[0] == ids[1] != other
    assert all(re.fullmatch(r"[\w-]{22}", shown) for shown in (*ids[0], *other))


def test_a_trace_is_freed_with_the_last_map_that_shows_it(host: Comfy, pair: Pair, store: Any) -> None:
    it, latents = run(host, pair.moe, store)
    (one,), (two,) = (
        drawn(host, node, trace=it.handle, image=image_of(latents)).ui["d2m_map"][0]["traces"] for node in "78"
    )
    store.free(one)
    assert (store.get(one), len(store)) == (None, 1)
    assert store.get(two) is it.trace
    store.free(one)  # once more
    assert len(store) == 1
    store.free(two)
    assert (len(store), store.bytes) == (0, 0)
    with pytest.raises(ValueError, match="has been freed"):
        drawn(host, trace=it.handle, image=image_of(latents))


def test_only_nodes_whose_trace_was_freed_run_again(host: Comfy, pair: Pair, store: Any) -> None:
    """ComfyUI runs a node whose fingerprint has changed, and everything behind it."""

    def fingerprints() -> dict[str, Any]:
        nodes = {"5": "D2MTraceRouting", "7": "D2MExpertMap", "8": "D2MExpertMap"}
        classes = host.nodes.NODE_CLASS_MAPPINGS
        return {
            node: classes[kind].PREPARE_CLASS_CLONE({"hidden_inputs": {hidden().unique_id: node}}).fingerprint_inputs()
            for node, kind in nodes.items()
        }

    def changed(before: dict[str, Any]) -> list[str]:
        now = fingerprints()
        return [node for node in now if now[node] != before[node]]

    it, latents = run(host, pair.moe, store)
    drawn(host, "8", trace=it.handle, image=image_of(latents))
    before = fingerprints()
    assert len(set(before.values())) == 3  # traces are freed node by node, so equal nodes do not share a cached result
    (first,) = drawn(host, "7", trace=it.handle, image=image_of(latents)).ui["d2m_map"][0]["traces"]
    latents = host.sample(it.model, (1, 8, 12), seed=9, steps=1)
    (second,) = drawn(host, "7", trace=it.handle, image=image_of(latents)).ui["d2m_map"][0]["traces"]
    store.free(first)  # replaced: the map does not show it any more, but a cache may have it
    assert changed(before) == ["7"]
    before = fingerprints()
    store.free(second)
    assert changed(before) == ["5", "7"]


@pytest.mark.parametrize("told_by", ["image", "latent"])
def test_an_older_image_that_comes_from_a_cache_is_shown_with_its_own_trace(
    host: Comfy, pair: Pair, store: Any, told_by: str
) -> None:
    """The case of --cache-lru: seed A, then seed B, whose trace replaces A's on the page, then A again."""
    with prompt("A"):
        it, latents = run(host, pair.moe, store)
        a = inputs_of(told_by, latents, 0.25)
        shown_a, map_a = said_of(drawn(host, trace=it.handle, **a))
    with prompt("B"):
        b = inputs_of(told_by, host.sample(it.model, (1, 8, 12), seed=9, steps=2), 0.75)
        shown_b, map_b = said_of(drawn(host, trace=it.handle, **b))
    assert shown_a != shown_b
    store.free(shown_a)
    with prompt("A again"):
        again, map_again = said_of(drawn(host, trace=it.handle, **a))
    assert store.get(again) is not None
    assert torch.equal(map_again, map_a)
    with prompt("B again"):
        again, map_again = said_of(drawn(host, trace=it.handle, **b))
    assert (again, torch.equal(map_again, map_b)) == (shown_b, True)
    store.free(shown_b)  # and with it all that no map shows
    assert [store.latents(key) is None for key in it.handle.runs] == [False, True]
    assert store.freed_count("5") == 1


@pytest.mark.parametrize("told_by", ["image", "latent"])
def test_an_older_image_whose_trace_is_gone_is_recorded_anew_when_it_is_queued_again(
    host: Comfy, pair: Pair, store: Any, told_by: str
) -> None:
    store.max_traces = 1
    with prompt("A"):
        it, latents = run(host, pair.moe, store)
        a = inputs_of(told_by, latents, 0.25)
        drawn(host, trace=it.handle, **a)
    with prompt("B"):
        drawn(host, trace=it.handle, **inputs_of(told_by, host.sample(it.model, (1, 8, 12), seed=9), 0.75))
    assert store.freed_count("5") == 0
    with prompt("A again"), pytest.raises(ValueError, match=r"has been freed .* Queue again"):
        drawn(host, trace=it.handle, **a)
    assert store.freed_count("5") == 1


@pytest.mark.parametrize("told_by", ["image", "latent"])
def test_an_older_image_whose_shown_trace_the_page_freed_is_recorded_anew(
    host: Comfy, pair: Pair, store: Any, told_by: str
) -> None:
    with prompt("A"):
        it, latents = run(host, pair.moe, store)
        a = inputs_of(told_by, latents, 0.25)
        drawn(host, trace=it.handle, **a)
    with prompt("B"):
        drawn(host, trace=it.handle, **inputs_of(told_by, host.sample(it.model, (1, 8, 12), seed=9, steps=2), 0.75))
    with prompt("A again, from ComfyUI's cache"):
        shown, _ = said_of(drawn(host, trace=it.handle, **a))
    assert store.freed_count("5") == 0
    store.free(shown)
    assert store.freed_count("5") == 1


def test_an_image_that_may_be_of_several_runs_is_not_guessed(host: Comfy, pair: Pair, store: Any) -> None:
    with prompt("A"):
        it, _ = run(host, pair.moe, store)
    with prompt("B"):
        latents = host.sample(it.model, (1, 8, 12), seed=9, steps=2)
    with prompt("C"):
        with pytest.raises(ValueError, match=r"Several images .* Connect the sampler's latent"):
            drawn(host, trace=it.handle, image=image_of(latents))
        assert store.freed_count("5") == 1  # queued again, it is sampled anew
        drawn(host, trace=it.handle, image=image_of(latents), latent={"samples": latents})
    with prompt("D"):
        drawn(host, trace=it.handle, image=image_of(latents))


def test_a_latent_of_another_model_does_not_sample_anew(host: Comfy, pair: Pair, store: Any) -> None:
    it, latents = run(host, pair.moe, store)
    with pytest.raises(ValueError, match="was not sampled with the MODEL"):
        drawn(host, trace=it.handle, latent={"samples": latents + 1})
    assert store.freed_count("5") == 0


def prompt(name: str) -> Any:
    """Execute the node as ComfyUI does."""
    from comfy_execution.utils import CurrentNodeContext

    return CurrentNodeContext(name, "7", None)


def inputs_of(told_by: str, latents: Tensor, value: float) -> dict[str, Any]:
    return {"image": image_of(latents, value)} if told_by == "image" else {"latent": {"samples": latents}}


def said_of(result: Any) -> tuple[str, Tensor]:
    """The id of the trace, and the map."""
    return result.ui["d2m_map"][0]["traces"][0], result.result[0]


def test_a_trace_that_goes_while_the_store_makes_room_does_not_fail_the_run(host: Comfy, store: Any) -> None:
    """The garbage collector may find a TRACE at any moment, in the thread that holds the lock."""
    handle_of = host.module("nodes.expert_map.trace_store").TraceHandle
    found: list[Any] = []

    class Collecting:
        @property
        def size(self) -> int:
            found.clear()
            return 10

    going, staying = handle_of(store, "5"), handle_of(store, "6")
    for _ in range(2):
        going.add_run(Collecting(), torch.zeros(4))
    found.append(going)
    del going
    staying.add_run(SimpleNamespace(size=20), torch.zeros(4))
    assert (len(store), store.bytes) == (1, 20)


def test_the_store_is_bounded_in_number_and_bytes(host: Comfy, pair: Pair, store: Any) -> None:
    it, latents = run(host, pair.moe, store, "5")
    (oldest,) = drawn(host, trace=it.handle, image=image_of(latents)).ui["d2m_map"][0]["traces"]
    others = [run(host, pair.moe, store, str(node))[0] for node in range(20, 22)]
    assert store.get(oldest) is not None  # used last
    store.max_traces = 3
    others.append(run(host, pair.moe, store, "30")[0])
    assert len(store) == 3
    assert store.get(oldest) is not None
    assert store.freed_count("20") == 1
    store.max_bytes = others[-1].trace.size + 1
    others.append(run(host, pair.moe, store, "31")[0])
    assert len(store) == 1
    assert store.get(oldest) is None
    assert store.bytes <= store.max_bytes


def test_a_trace_that_no_map_shows_goes_with_the_node_that_recorded_it(host: Comfy, pair: Pair, store: Any) -> None:
    it, _ = run(host, pair.moe, store, "5")
    shown, pictures = run(host, pair.moe, store, "6")
    (id_,) = drawn(host, trace=shown.handle, image=image_of(pictures)).ui["d2m_map"][0]["traces"]
    assert len(store) == 2
    del it, shown
    gc.collect()
    assert len(store) == 1
    assert store.get(id_) is not None
    assert store.freed_count("5") == 0


def test_of_a_node_that_samples_again_and_again_four_traces_are_kept(host: Comfy, pair: Pair, store: Any) -> None:
    it, _ = run(host, pair.moe, store)
    prompts = host.conditioning(pair.moe, 1), host.conditioning(pair.moe, 2)
    for _ in range(6):
        sample(it.model, *prompts, steps=1)
    assert len(store) == len(it.handle.runs) == 4
    assert store.freed_count("5") == 0


def test_what_a_trace_says_can_be_sent(host: Comfy, grouped: Grouped, store: Any) -> None:
    it, _ = run(host, grouped.moe, store)
    host.sample(it.model, BATCH, steps=1)
    said = json.loads(json.dumps(it.trace.described, allow_nan=False))
    assert said["groups"] == [{"kind": group.kind, "first": group.first, "blocks": group.blocks} for group in GROUPS]
    assert [layer["name"] for layer in said["layers"]] == it.trace.layers

"""The Expert Map: its image, what it says when it cannot draw, and the traces that the server holds for it."""

from __future__ import annotations

import gc
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import BATCH, GROUPS, Grouped, active
from tests.comfyui.test_trace import Traced, sample, traced

WIDGETS: dict[str, Any] = {
    "step": -1,
    "block": -1,
    "prompt": "positive",
    "opacity": 0.75,
    "numbers": False,
    "legend": False,
}
GREY = 0.5


def image_of(latents: Tensor, value: float = GREY) -> Tensor:
    batch, _, height, width = latents.shape
    return torch.full((batch, 8 * height, 8 * width, 3), value)


def drawn(host: Comfy, node: str = "7", **inputs: Any) -> Any:
    """Return the node's result; its map is [B, H, W, C]."""
    return host.execute("D2MExpertMap", hidden={hidden().unique_id: node}, **{**WIDGETS, **inputs})


def hidden() -> Any:
    from comfy_api.latest import io

    return io.Hidden


def by_patch(map_HW3: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The colour of the middle of every patch, [h, w, 3]."""
    rows, columns = ((np.arange(n) + 0.5) * side / n for n, side in zip(grid, map_HW3.shape[:2], strict=True))
    return map_HW3.numpy()[rows.astype(int)][:, columns.astype(int)]


@pytest.fixture
def store(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty one."""
    module = host.module("nodes.expert_map.trace_store")
    found = module.TraceStore()
    for name in ("trace_node", "map_node", "routes"):
        monkeypatch.setattr(host.module(f"nodes.expert_map.{name}"), "STORE", found)
    return found


def run(host: Comfy, model: Any, store: Any, node: str = "5") -> tuple[Traced, Tensor]:
    """A traced MODEL, sampled."""
    clone, handle = host.execute("D2MTraceRouting", hidden={hidden().unique_id: node}, model=model).result
    it = Traced(clone, handle, store)
    return it, host.sample(it.model, (1, 8, 12), steps=2)


# The image


def test_a_muted_expert_paints_no_patch(host: Comfy) -> None:
    experts_TK = np.array([[1, 0], [2, 255], [1, 255], [0, 1]], np.uint8)
    best_experts = host.module("nodes.expert_map.map_node")._best_experts
    assert best_experts(experts_TK, []).tolist() == [1, 2, 1, 0]
    assert best_experts(experts_TK, [1]).tolist() == [0, 2, 255, 0]
    assert best_experts(experts_TK[:, :0], [1]).tolist() == [255] * 4  # Top-K 0


def test_a_patch_has_its_best_experts_colour_as_strongly_as_it_was_chosen(host: Comfy, pair: Pair, store: Any) -> None:
    it, latents = run(host, pair.moe, store)
    (map_HW3,) = drawn(host, trace=it.handle, image=image_of(latents), step=0, block=3).result[0]
    choice = it.trace.of_image(0, it.trace.samples[0], "single_blocks.1")
    best, margin = choice.experts_TK[:, 0], choice.margin_T / 255
    shown = 0.75 * (0.3 + 0.7 * np.minimum(1, margin / np.quantile(margin, 0.98)))
    colour = host.module("nodes.expert_map.map_image").expert_colour
    hues = np.array([colour(expert) for expert in best]) / 255
    expected = GREY + (hues - GREY) * shown[:, None]
    assert np.abs(by_patch(map_HW3, (4, 6)).reshape(-1, 3) - expected).max() <= 2 / 255


@pytest.mark.parametrize(
    ("block", "ffn"), [(1, "double_blocks.1.img_mlp"), (2, "single_blocks.0"), (-1, "single_blocks.2")]
)
def test_blocks_are_counted_from_the_first_double_block(
    host: Comfy, pair: Pair, store: Any, block: int, ffn: str
) -> None:
    it, latents = run(host, pair.moe, store)
    (map_HW3,) = drawn(host, trace=it.handle, image=image_of(latents), block=block, opacity=1.0).result[0]
    choice = it.trace.of_image(1, it.trace.samples[0], ffn)
    sure = choice.margin_T >= np.quantile(choice.margin_T, 0.98)
    colour = host.module("nodes.expert_map.map_image").expert_colour
    expected = np.array([colour(expert) for expert in choice.experts_TK[:, 0]]) / 255
    assert np.abs(by_patch(map_HW3, (4, 6)).reshape(-1, 3)[sure] - expected[sure]).max() <= 2 / 255


def test_every_image_of_a_batch_gets_its_own_map(host: Comfy, pair: Pair, store: Any) -> None:
    it, _ = run(host, pair.moe, store)
    latents = host.sample(it.model, (2, 8, 8), cfg=2.0, steps=1)
    maps = drawn(host, trace=it.handle, image=image_of(latents)).result[0]
    assert maps.shape[0] == 2
    assert not torch.equal(maps[0], maps[1])
    negative = drawn(host, trace=it.handle, image=image_of(latents), prompt="negative").result[0]
    assert not torch.equal(maps, negative)
    latents = host.sample(it.model, (2, 8, 8), steps=1)
    with pytest.raises(ValueError, match=r"nothing of the negative prompt.*has: positive"):
        drawn(host, trace=it.handle, image=image_of(latents), prompt="negative")
    with pytest.raises(ValueError, match="There are 3 images, but 2 in the trace"):
        drawn(host, trace=it.handle, image=torch.zeros(3, 64, 64, 3))


def test_a_block_that_was_skipped_leaves_the_image_as_it_is(host: Comfy, grouped: Grouped, store: Any) -> None:
    it, _ = run(host, active(host, grouped.moe, [0, 5]), store)
    latents = host.sample(it.model, (1, 8, 8), steps=1)
    image = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    skipped = drawn(host, trace=it.handle, image=image, latent={"samples": latents}, block=GROUPS[0].first).result[0]
    assert (skipped - image).abs().max() <= 1 / 255
    ran = drawn(host, trace=it.handle, image=image, block=5).result[0]
    assert (ran - image).abs().mean() >= 0.02


def test_without_an_image_the_latent_tells_when_sampling_is_through(host: Comfy, pair: Pair, store: Any) -> None:
    it, latents = run(host, pair.moe, store)
    result = drawn(host, trace=it.handle, latent={"samples": latents})
    assert result.result[0].shape[1:] == (512, 768, 3)
    (said,) = result.ui["d2m_map"]
    assert said["images"] == [None]
    assert said["batches"] == [[]]


def test_of_runs_that_share_a_trace_the_latent_picks_one(host: Comfy, pair: Pair, store: Any) -> None:
    it, first = run(host, pair.moe, store)
    before = drawn(host, trace=it.handle, latent={"samples": first}).result[0]
    second = host.sample(it.model, (1, 8, 12), seed=5, steps=2)
    assert torch.equal(drawn(host, trace=it.handle, latent={"samples": first}).result[0], before)
    last = drawn(host, trace=it.handle, image=image_of(first)).result[0]
    assert not torch.equal(last, before)
    assert it.handle.find_run(second) == it.handle.runs[-1]


def test_two_traces_are_drawn_side_by_side_with_a_legend_beneath(host: Comfy, pair: Pair, store: Any) -> None:
    one, latents = run(host, host.top_k(pair.moe, 1), store, "5")
    two, others = run(host, host.top_k(pair.moe, 12), store, "6")
    alone = drawn(host, trace=one.handle, image=image_of(latents)).result[0]
    both = {"trace": one.handle, "image": image_of(latents), "compare": two.handle, "compare_image": image_of(others)}
    result = drawn(host, **both)
    height, width = alone.shape[1:3]
    assert result.result[0].shape == (1, height, 2 * width + 16, 3)
    assert len(set(result.ui["d2m_map"][0]["traces"])) == 2
    assert [len(batch) for batch in result.ui["d2m_map"][0]["batches"]] == [1, 1]
    with_legend = drawn(host, **both, legend=True).result[0]
    assert with_legend.shape[1] > height
    assert torch.equal(with_legend[:, :height], result.result[0])
    swatches = {
        tuple((pixel * 255).round().int().tolist()) for pixel in with_legend[0, height:].reshape(-1, 3).unique(dim=0)
    }
    colours = host.module("nodes.expert_map.map_image").expert_colour
    assert {colours(expert) for expert in range(12)} <= swatches


def test_regions_bear_their_experts_number(host: Comfy) -> None:
    image = host.module("nodes.expert_map.map_image")
    best = np.zeros((16, 16), np.uint8)
    best[:, 8:] = 3
    panel = image.Panel(title="t", grid=(16, 16), best_hw=best, margin_hw=np.ones((16, 16)), image_HW3=None)
    bare, numbered = (image.draw_panels([panel], 12, 1.0, labels=labels, legend=False) for labels in (False, True))
    changed = np.abs(bare - numbered).max(-1) > 0.1
    assert 0 < changed[:, :256].mean() < 0.05
    assert 0 < changed[:, 256:].mean() < 0.05
    columns = np.tile(np.array([[0, 7]], np.uint8), (64, 32))  # without room for a number
    panel = image.Panel(title="t", grid=(64, 64), best_hw=columns, margin_hw=np.ones((64, 64)), image_HW3=None)
    bare, numbered = (image.draw_panels([panel], 12, 1.0, labels=labels, legend=False) for labels in (False, True))
    assert np.array_equal(bare, numbered)


def test_maps_of_one_batch_are_of_one_height_whatever_their_shares(host: Comfy) -> None:
    image = host.module("nodes.expert_map.map_image")
    grid = (76, 52)
    even = (np.arange(grid[0] * grid[1]) % 12).astype(np.uint8).reshape(grid)
    most_in_the_last = np.where(np.arange(even.size).reshape(grid) % 10 < 3, 11, even).astype(np.uint8)
    for widths in (1, 2):  # alone, and beside another trace's
        heights = {
            image.draw_panels([made(image, grid, best)] * widths, 12, 0.75, labels=False, legend=True).shape[0]
            for best in (even, most_in_the_last, np.full(grid, 11, np.uint8), None)
        }
        assert len(heights) == 1


def made(image: Any, grid: tuple[int, int], best_hw: np.ndarray | None) -> Any:
    """A panel; None: its block was skipped."""
    margin_hw = None if best_hw is None else np.ones(grid)
    return image.Panel(
        title="t", grid=grid, best_hw=best_hw, margin_hw=margin_hw, image_HW3=np.zeros((16 * grid[0], 16 * grid[1], 3))
    )


# What is wrong


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"step": 2}, r"step is 2, but the trace has 2: 0 to 1, or -1"),
        ({"block": 0}, r"Block 0 has no experts\. Those that have: 1-4\."),
        ({"block": 5}, r"Block 5 has no experts"),
        ({"image": None}, r"has to wait for the sampler: connect image .* or latent"),
    ],
)
def test_what_cannot_be_drawn_is_said(host: Comfy, pair: Pair, store: Any, inputs: dict, message: str) -> None:
    it, latents = run(host, pair.moe, store)
    with pytest.raises(ValueError, match=message):
        drawn(host, **{"trace": it.handle, "image": image_of(latents), **inputs})


def test_an_empty_trace_and_a_second_one_that_nothing_waits_for_are_said(host: Comfy, pair: Pair, store: Any) -> None:
    it, latents = run(host, pair.moe, store)
    empty = traced(host, pair.moe)
    with pytest.raises(ValueError, match="This trace is empty"):
        drawn(host, trace=empty.handle, image=image_of(latents))
    with pytest.raises(ValueError, match=r"connect compare_image .* or compare_latent"):
        drawn(host, trace=it.handle, image=image_of(latents), compare=it.handle)


def test_another_model_cannot_be_traced(host: Comfy, pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"FLUX-MoE Trace Routing works on a FLUX-MoE, but this MODEL is a Flux"):
        traced(host, pair.teacher)


# Colours


# Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
TO_LMS = np.array(
    [[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.62997870]]
)  # fmt: skip
TO_LAB = np.array(
    [[0.21045426, 0.79361779, -0.00407205], [1.97799850, -2.42859221, 0.45059371], [0.02590404, 0.78277177, -0.80867577]]
)  # fmt: skip


@pytest.mark.parametrize("kind", BLINDNESS)
def test_twelve_experts_are_told_apart_with_every_kind_of_colour_blindness(host: Comfy, kind: str) -> None:
    """Distances in OKLab, where 0.02 is about the smallest visible difference. (Numbers in the regions tell the rest.)"""
    colours = np.array([host.module("nodes.expert_map.map_image").expert_colour(expert) for expert in range(12)]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ BLINDNESS[kind].T, 0, 1)
    lab = np.cbrt(seen @ TO_LMS.T) @ TO_LAB.T
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(12, 1)]
    assert distances.min() >= 0.02


# The store


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

"""The Expert Map: its image, and what it says when it cannot draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import GROUPS, Grouped, active
from tests.comfyui.map_runs import GREY, by_patch, drawn, image_of, run
from tests.comfyui.test_trace import traced

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

"""The Expert map on its node: real runs, real routes, both renderers."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from playwright.sync_api import Locator, expect

from demo.server import ApiGraph
from tests.browser.driver import Comfy
from tests.browser.map_page import DRAWN

STEPS = 3
TRACE, MAP = 2, 9


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def graph(cfg: float = 1.0) -> ApiGraph:
    return {
        "1": node("D2MLoadFluxMoE", model_name="emoji-flux-moe.safetensors", weight_dtype="default"),
        "2": node("D2MTraceRouting", model=["1", 0]),
        "4": node("D2MEmojiPrompt", text="fox in the centre on blue", guidance=3.5),
        "5": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "6": node(
            "KSampler", model=["2", 0], seed=7, steps=STEPS, cfg=cfg, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=["4", 0], negative=["4", 0], latent_image=["5", 0],
        ),
        "7": node("VAELoader", vae_name="emoji-autoencoder.safetensors"),
        "8": node("VAEDecode", samples=["6", 0], vae=["7", 0]),
        "9": node("D2MExpertMap", trace=["2", 1], image=["8", 0], **OPTIONS),
    }  # fmt: skip


OPTIONS = {"step": -1, "block": -1, "prompt": "positive", "opacity": 0.75, "numbers": True, "legend": True}


def masked() -> ApiGraph:
    return {
        **graph(),
        "3": node("D2MExpertMask", model=["1", 0], mask=""),
        "2": node("D2MTraceRouting", model=["3", 0]),
    }


def compared() -> ApiGraph:
    """Top-K 1 beside the file's."""
    found = graph()
    return {
        **found,
        "11": node("D2MTopK", model=["1", 0], top_k=1, gate="as in the file", capacity=1.0),
        "12": node("D2MTraceRouting", model=["11", 0]),
        "16": node("KSampler", **{**found["6"]["inputs"], "model": ["12", 0]}),
        "18": node("VAEDecode", samples=["16", 0], vae=["7", 0]),
        "9": node(
            "D2MExpertMap", trace=["2", 1], image=["8", 0], compare=["12", 1], compare_image=["18", 0], **OPTIONS
        ),
    }


def look(comfy: Comfy) -> Locator:
    """Bring the map onto the screen."""
    comfy.js(
        """() => {
            const graph = app.canvas.graph;
            const node = graph.nodes.find(it => it.comfyClass === 'D2MExpertMap');
            node.pos = [2000, 0];
            app.canvas.ds.scale = 0.8;
            app.canvas.ds.offset = [-1800, 50];
            app.canvas.setDirty(true, true);
        }"""
    )
    return comfy.page.locator(".d2m-map")


def run(comfy: Comfy) -> Locator:
    root = look(comfy)
    prompt = comfy.queue()
    comfy.wait(prompt)
    comfy.wait_until_ended(prompt)
    comfy.page.wait_for_function(DRAWN)
    return root


def traces(comfy: Comfy) -> list[str]:
    found: list[str] = comfy.js(
        "() => app.canvas.graph.nodes.find(it => it.comfyClass === 'D2MExpertMap').properties.d2m_map.traces"
    )
    return found


def to(root: Locator, name: str, value: int) -> None:
    root.get_by_role("slider", name=name, exact=True).evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
    )
    expect(root).to_have_attribute("aria-busy", "false")


def mask(comfy: Comfy, number: int | str) -> str:
    return str(comfy.value(number, "mask"))


def test_the_map_shows_what_the_server_has_for_every_patch_of_a_row(comfy: Comfy) -> None:
    comfy.build(graph())
    root = run(comfy)
    (trace,) = traces(comfy)
    described = comfy.server.get(f"/d2m/traces/{trace}")
    to(root, "Step", 1)
    to(root, "Block", 0)
    names = [layer["name"] for layer in described["layers"]]
    assert names[0].endswith(".img_mlp")
    body = comfy.js(
        "path => fetch(path).then(it => it.arrayBuffer()).then(it => [...new Uint8Array(it)])",
        f"/d2m/traces/{trace}/steps/1/samples/0",
    )
    width, slots = described["grid"]["width"], described["slots"]
    experts = np.array(body[: width * slots]).reshape(width, slots)
    stage = root.locator(".d2m-stage:visible")
    stage.focus()
    comfy.page.keyboard.press("Control+Home")
    for column in range(width):
        chosen = re.findall(r"expert (\d+)", stage.locator(".d2m-cell").text_content() or "")
        assert [int(it) for it in chosen] == experts[column].tolist()
        comfy.page.keyboard.press("ArrowRight")
    expect(root.get_by_role("slider", name="Step")).to_have_attribute("max", str(STEPS - 1))


def test_the_map_follows_its_node_in_size(comfy: Comfy) -> None:
    comfy.build(graph())
    root = run(comfy)
    before = root.bounding_box()
    comfy.js(
        "id => { const node = app.rootGraph.getNodeById(id); node.setSize([1.5 * node.size[0], 1300]); "
        "app.canvas.setDirty(true, true); }",
        MAP,
    )
    comfy.page.wait_for_timeout(500)
    after = root.bounding_box()
    assert before is not None
    assert after is not None
    assert after["width"] > before["width"] * 1.4
    stage = root.locator(".d2m-stage:visible canvas").bounding_box()
    assert stage is not None
    assert stage["x"] + stage["width"] <= after["x"] + after["width"]
    assert stage["y"] + stage["height"] <= after["y"] + after["height"]


def test_muting_an_expert_changes_the_next_run(comfy: Comfy) -> None:
    comfy.build(masked())
    root = run(comfy)
    root.locator(".d2m-rules select").select_option("all")
    root.locator('.d2m-expert[data-expert="0"]').click()
    root.get_by_role("button", name="Mute").click()
    assert mask(comfy, 3) == "*: 0=0"
    assert comfy.prompt()["3"]["inputs"]["mask"] == "*: 0=0"
    (before,) = traces(comfy)
    run(comfy)
    (after,) = traces(comfy)
    assert after != before
    step = comfy.server.get(f"/d2m/traces/{after}")["steps"][0]
    assert {weights[0] for weights in step["settings"]["mask"].values()} == {0}
    expect(root.locator('.d2m-expert[data-expert="0"]')).to_contain_text("×0")


def test_a_missing_mask_node_is_inserted_before_the_trace(comfy: Comfy) -> None:
    comfy.build(graph())
    root = run(comfy)
    root.locator('.d2m-expert[data-expert="1"]').click()
    root.get_by_role("button", name="Insert Expert Mask").click()
    root.get_by_role("button", name="Boost").click()
    prompt = comfy.prompt()
    (number,) = [key for key, it in prompt.items() if it["class_type"] == "D2MExpertMask"]
    assert prompt[str(TRACE)]["inputs"]["model"] == [number, 0]
    assert prompt[number]["inputs"]["model"] == ["1", 0]
    assert re.fullmatch(r"single_blocks\.\d+: 1=2", prompt[number]["inputs"]["mask"])


@pytest.mark.parametrize(
    "inside", [[3], [3, TRACE], [1, 3, TRACE, 6]], ids=["mask", "mask and trace", "up to the sampler"]
)
def test_the_mask_is_found_and_written_inside_a_subgraph(comfy: Comfy, inside: list[int]) -> None:
    comfy.build(masked())
    subgraph = comfy.into_subgraph(inside)
    root = run(comfy)
    root.locator('.d2m-expert[data-expert="2"]').click()
    root.get_by_role("button", name="Isolate").click()
    assert re.fullmatch(r"single_blocks\.\d+: \*=0, 2=1", comfy.prompt()[f"{subgraph}:3"]["inputs"]["mask"])


def test_a_mask_is_inserted_inside_the_subgraph_of_the_trace(comfy: Comfy) -> None:
    comfy.build(graph())
    subgraph = comfy.into_subgraph([TRACE, 6])
    root = run(comfy)
    root.locator('.d2m-expert[data-expert="1"]').click()
    root.get_by_role("button", name="Insert Expert Mask").click()
    root.get_by_role("button", name="Mute").click()
    prompt = comfy.prompt()
    (number,) = [key for key, it in prompt.items() if it["class_type"] == "D2MExpertMask"]
    assert number.startswith(f"{subgraph}:")
    assert prompt[f"{subgraph}:{TRACE}"]["inputs"]["model"] == [number, 0]
    assert prompt[number]["inputs"]["model"] == ["1", 0]


def test_a_map_inside_a_subgraph_is_shown_and_writes_to_the_mask_outside(comfy: Comfy) -> None:
    comfy.build(masked())
    subgraph = comfy.into_subgraph([8, MAP])
    comfy.js("id => app.canvas.openSubgraph(app.rootGraph.getNodeById(id).subgraph)", int(subgraph))
    root = run(comfy)
    root.locator('.d2m-expert[data-expert="2"]').click()
    root.get_by_role("button", name="Mute").click()
    assert re.fullmatch(r"single_blocks\.\d+: 2=0", comfy.prompt()["3"]["inputs"]["mask"])


def test_two_top_k_are_compared_side_by_side(comfy: Comfy) -> None:
    comfy.build(compared())
    root = run(comfy)
    root.get_by_role("radio", name="Side by side").click()
    expect(root.locator(".d2m-stage:visible")).to_have_count(2)
    expect(root.locator(".d2m-pane-title:visible")).to_have_text([re.compile(r"A · Top-K \d+"), "B · Top-K 1"])
    root.get_by_role("radio", name="Difference").click()
    expect(root.locator(".d2m-note:visible")).to_contain_text("% of the patches")


def test_prompt_and_negative_prompt_can_be_told_apart(comfy: Comfy) -> None:
    comfy.build(graph(cfg=3.0))
    root = run(comfy)
    picker = root.get_by_label("Sample")
    expect(picker.locator("option")).to_have_text(["image 1 · prompt", "image 1 · negative prompt"])
    picker.select_option("1")
    expect(root).to_have_attribute("aria-busy", "false")


def test_map_and_view_outlive_a_reload(comfy: Comfy) -> None:
    comfy.build(graph())
    root = run(comfy)
    to(root, "Step", 1)
    root.get_by_role("tab", name="Text tokens").click()
    comfy.page.wait_for_timeout(800)
    comfy.keep()
    before = traces(comfy)
    comfy.page.reload()
    comfy.wait_until_ready()
    comfy.page.wait_for_function("id => app.rootGraph.getNodeById(id)", arg=MAP)
    root = look(comfy)
    expect(root.locator(".d2m-body")).to_be_visible()
    assert traces(comfy) == before
    expect(root.get_by_role("slider", name="Step")).to_have_value("1")
    expect(root.get_by_role("tab", name="Text tokens")).to_have_attribute("aria-selected", "true")


def test_a_new_run_takes_the_place_of_the_old_trace(comfy: Comfy) -> None:
    comfy.build(graph())
    run(comfy)
    (before,) = traces(comfy)
    comfy.set_widget(6, "seed", 8)
    with comfy.page.expect_response(lambda it: it.request.method == "DELETE" and it.url.endswith(before)):
        run(comfy)
    (after,) = traces(comfy)
    assert after != before
    assert comfy.server.get(f"/d2m/traces/{after}")["id"] == after
    with pytest.raises(HTTPError, match="404"):
        comfy.server.get(f"/d2m/traces/{before}")


def test_a_freed_trace_says_so_and_the_next_run_brings_it_back(comfy: Comfy) -> None:
    comfy.build(graph())
    root = run(comfy)
    (trace,) = traces(comfy)
    assert comfy.js("path => fetch(path, { method: 'DELETE' }).then(it => it.status)", f"/d2m/traces/{trace}") == 204
    root.get_by_role("slider", name="Step").evaluate("it => { it.value = 0; it.dispatchEvent(new Event('input')); }")
    expect(root.locator(".d2m-message")).to_contain_text("Run the workflow again")
    run(comfy)


def test_the_wheel_over_the_map_zooms_the_graph(comfy: Comfy) -> None:
    comfy.build(graph())
    root = run(comfy)
    root.locator(".d2m-stage:visible").hover()
    before = comfy.js("() => app.canvas.ds.scale")
    comfy.page.mouse.wheel(0, -200)
    comfy.page.wait_for_function("before => app.canvas.ds.scale > before", arg=before)


def test_delete_pressed_in_the_map_does_not_remove_the_node(comfy: Comfy) -> None:
    comfy.build(graph())
    root = run(comfy)
    root.locator(".d2m-stage:visible").click()
    comfy.page.keyboard.press("Delete")
    assert comfy.js("id => Boolean(app.rootGraph.getNodeById(id))", MAP)


def test_nothing_of_the_widget_is_in_the_prompt(comfy: Comfy) -> None:
    comfy.build(graph())
    run(comfy)
    assert comfy.prompt()[str(MAP)]["inputs"] == json.loads(
        json.dumps({"trace": ["2", 1], "image": ["8", 0], **OPTIONS})
    )

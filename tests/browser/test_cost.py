"""The cost readout at the foot of the nodes."""

from __future__ import annotations

import re
from itertools import count
from typing import Any

from playwright.sync_api import expect

from demo.server import ApiGraph
from tests.browser.driver import Comfy

FILE = "emoji-flux-moe.safetensors"
SIZE = {"width": "128", "height": "128"}
UNUSED = count(20)  # ids of nodes that no other test has


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def top_k(model: str, k: int) -> dict[str, Any]:
    return node("D2MTopK", model=[model, 0], top_k=k, gate="as in the file", capacity=1.0)


def graph() -> ApiGraph:
    return {
        "1": node("D2MLoadFluxMoE", model_name=FILE, weight_dtype="default"),
        "2": top_k("1", 2),
        "3": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
    }


def line(comfy: Comfy, **settings: Any) -> str:
    """Return the readout expected for these settings, from the server's numbers."""
    asked = {**SIZE, **{name: str(value) for name, value in settings.items()}}
    answer = comfy.server.get("/d2m/cost", model_name=FILE, **asked)
    active, dense = (f"{number / 1e6:.3g}" for number in (answer["touched"], answer["dense"]["touched"]))
    size = f"{answer['width']}²" if answer["width"] == answer["height"] else f"{answer['width']} × {answer['height']}"
    percent = round(answer["flops_ratio"] * 100)
    return f"{active} of {dense} M parameters · {percent} % of dense compute at {size}"


def expect_line(comfy: Comfy, node: int | str, said: str) -> None:
    comfy.page.wait_for_function(
        "([id, said]) => app.canvas.graph.getNodeById(id).widgets.at(-1).element.innerText.trim() === said",
        arg=[node, said],
    )


def test_the_readout_follows_the_settings_and_the_image_size(comfy: Comfy) -> None:
    comfy.build(graph())
    comfy.show_all()
    expect_line(comfy, 2, line(comfy, top_k=2))
    comfy.move_slider(2, "top_k", 7)
    expect_line(comfy, 2, line(comfy, top_k=7))
    expect_line(comfy, 1, line(comfy))  # the file's own
    assert line(comfy, top_k=7) != line(comfy, top_k=2)
    comfy.set_widget(3, "width", 256)
    expect_line(comfy, 2, line(comfy, top_k=7, width=256))
    shown = comfy.page.get_by_text(line(comfy, top_k=7, width=256), exact=True)
    expect(shown).to_be_visible()


def test_the_readout_sees_through_other_nodes_and_the_last_top_k_counts(comfy: Comfy) -> None:
    drawn = graph()
    drawn["1"] = node("UNETLoader", unet_name=FILE, weight_dtype="default")
    drawn["4"] = node("ModelSamplingFlux", model=["2", 0], max_shift=1.15, base_shift=0.5, width=128, height=128)
    drawn["5"] = top_k("4", 9)
    drawn["6"] = node("D2MExpertMask", model=["5", 0], mask="")
    comfy.build(drawn)
    comfy.js(  # a reroute between them
        """() => {
            const reroute = LiteGraph.createNode('Reroute');
            app.rootGraph.add(reroute);
            app.rootGraph.getNodeById(4).connect(0, reroute, 0);
            reroute.connect(0, app.rootGraph.getNodeById(5), 0);
        }"""
    )
    expect_line(comfy, 6, line(comfy, top_k=9))
    comfy.js("() => { app.rootGraph.getNodeById(5).mode = 4; }")  # bypassed
    expect_line(comfy, 6, line(comfy, top_k=2))


def test_the_readout_sees_through_subgraphs_and_promoted_widgets(comfy: Comfy) -> None:
    drawn = graph()
    drawn["4"] = node("D2MExpertMask", model=["2", 0], mask="")
    comfy.build(drawn)
    host = comfy.into_subgraph([2], promote=(2, "top_k"))
    comfy.set_widget(host, "top_k", 6)
    expect_line(comfy, 4, line(comfy, top_k=6))
    comfy.js("id => app.canvas.setGraph(app.rootGraph.getNodeById(id).subgraph)", host)
    expect_line(comfy, 2, line(comfy, top_k=6))


def test_what_cannot_be_said_is_said_quietly(comfy: Comfy) -> None:
    drawn = graph()
    drawn["2"]["inputs"]["top_k"] = 13
    comfy.build(drawn)
    expect_line(comfy, 2, "top_k is '13'; expected a whole number, 0 to 12.")
    quiet = "app.rootGraph.getNodeById(2).widgets.at(-1).element.querySelector('.d2m-quiet') !== null"
    assert comfy.js(f"() => {quiet}")
    comfy.set_widget(2, "top_k", 12)
    expect_line(comfy, 2, line(comfy, top_k=12))
    assert not comfy.js(f"() => {quiet}")
    comfy.js("() => app.rootGraph.getNodeById(2).disconnectInput(0)")
    expect_line(comfy, 2, "")


def test_under_a_schedule_the_readout_gives_the_span(comfy: Comfy) -> None:
    drawn = graph()
    pieces = "0 - 50: 8  # rough\n50 - 100: 1"
    drawn["4"] = node("D2MSchedule", model=["2", 0], setting="top_k", unit="percent", pieces=pieces)
    comfy.build(drawn)
    (least, of, percent), (most, _, most_percent) = (
        re.split(r" (of .* ·) | %", line(comfy, top_k=k))[:3] for k in (1, 8)
    )
    rest = line(comfy, top_k=1).split(" % ")[1]
    expect_line(comfy, 4, f"{least}–{most} {of} {percent}–{most_percent} % {rest}")
    expect_line(comfy, 2, line(comfy, top_k=2))


def test_what_a_conversion_costs_is_known_when_it_has_run(comfy: Comfy) -> None:
    conversion = str(next(UNUSED))  # the server remembers what a node of an earlier test gave
    drawn: ApiGraph = {
        "1": node("UNETLoader", unet_name="teacher.safetensors", weight_dtype="default"),
        conversion: node(
            "D2MConvertFlux", model=["1", 0], preset="L", split_only=True, samples=1, steps=1, size=128, seed=0, top_k=2,
            router="top_k", block_routers="random",
        ),
        "3": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "4": top_k(conversion, 3),
        "5": node("D2MSaveFluxMoE", model=["4", 0], filename_prefix="diffusion_models/converted"),
    }  # fmt: skip
    comfy.build(drawn)
    wait_for_line(comfy, "Run once to see the cost")
    comfy.server.wait(comfy.queue())
    wait_for_line(comfy, " of 2.13 M parameters")
    before = comfy.readout(4)
    comfy.set_widget(4, "top_k", 9)
    comfy.page.wait_for_function(
        "before => app.rootGraph.getNodeById(4).widgets.at(-1).element.innerText !== before", arg=before
    )


def wait_for_line(comfy: Comfy, part: str) -> None:
    """Return the readout of node 4."""
    comfy.page.wait_for_function(
        "part => app.rootGraph.getNodeById(4).widgets.at(-1).element.innerText.includes(part)", arg=part
    )


def test_sliders_end_where_the_file_does_and_what_it_lacks_is_hidden(comfy: Comfy) -> None:
    drawn = graph()
    drawn["2"]["inputs"]["top_k"] = 12
    comfy.build(drawn)
    comfy.page.wait_for_function("() => app.rootGraph.getNodeById(2).widgets[0].options.max === 12")
    assert comfy.js("() => app.rootGraph.getNodeById(2).widgets.map(({ hidden }) => Boolean(hidden))") == [
        False, False, True, False,
    ]  # fmt: skip
    if comfy.vue:  # which drew 12 of 64 until the slider was touched
        slider = comfy.page.locator('[data-node-id="2"]').get_by_role("slider").first
        expect(slider).to_have_attribute("aria-valuemax", "12")


def test_the_seconds_of_a_step_are_shown_after_a_run(comfy: Comfy) -> None:
    drawn = graph()
    drawn["4"] = node("D2MEmojiPrompt", text="fox", guidance=3.5)
    drawn["5"] = node(
        "KSampler", model=["2", 0], seed=1, steps=3, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        positive=["4", 0], negative=["4", 0], latent_image=["3", 0],
    )  # fmt: skip
    drawn["6"] = node("VAELoader", vae_name="emoji-autoencoder.safetensors")
    drawn["7"] = node("VAEDecode", samples=["5", 0], vae=["6", 0])
    drawn["8"] = node("PreviewImage", images=["7", 0])
    comfy.build(drawn)
    expect_line(comfy, 2, line(comfy, top_k=2))
    comfy.wait(comfy.queue())
    readout = "app.rootGraph.getNodeById(2).widgets.at(-1).element"
    comfy.page.wait_for_function(f"() => / · [.0-9e-]+ s a step$/.test({readout}.innerText.trim())")
    box = comfy.js(
        f"() => {{ const it = {readout}.querySelector('.d2m-cost'); return [it.scrollHeight, it.clientHeight]; }}"
    )
    assert box[0] <= box[1] + 1  # nothing is cut off
    comfy.set_widget(2, "top_k", 3)
    expect_line(comfy, 2, line(comfy, top_k=3))  # not measured yet


def test_neither_the_saved_workflow_nor_the_prompt_knows_of_the_readout(comfy: Comfy) -> None:
    comfy.build(graph())
    expect_line(comfy, 2, line(comfy, top_k=2))
    assert comfy.prompt() == graph()
    saved = {it["id"]: it for it in comfy.workflow()["nodes"]}
    assert saved[2]["widgets_values"] == [2, "as in the file", 1]
    assert [it["name"] for it in saved[2]["inputs"]] == ["model", "top_k", "gate", "capacity"]

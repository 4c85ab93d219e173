"""The cost readout at the foot of the nodes."""

from __future__ import annotations

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
    return f"{active} of {dense} M active · {round(answer['flops_ratio'] * 100)} % FLOPs"


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
    (least, of, *_, percent, sign, flops), (most, *_, most_percent, _, _) = (
        line(comfy, top_k=k).split() for k in (1, 8)
    )
    dense = line(comfy, top_k=1).split()[2]
    expect_line(comfy, 4, f"{least}–{most} {of} {dense} M active · {percent}–{most_percent} {sign} {flops}")
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
    wait_for_line(comfy, "Queue the workflow")
    comfy.server.wait(comfy.queue())
    wait_for_line(comfy, " of 2.13 M active")
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


def test_sliders_end_where_the_file_does(comfy: Comfy) -> None:
    comfy.build(graph())
    comfy.page.wait_for_function("() => app.rootGraph.getNodeById(2).widgets[0].options.max === 12")


def test_neither_the_saved_workflow_nor_the_prompt_knows_of_the_readout(comfy: Comfy) -> None:
    comfy.build(graph())
    expect_line(comfy, 2, line(comfy, top_k=2))
    assert comfy.prompt() == graph()
    saved = {it["id"]: it for it in comfy.workflow()["nodes"]}
    assert saved[2]["widgets_values"] == [2, "as in the file", 1]
    assert [it["name"] for it in saved[2]["inputs"]] == ["model", "top_k", "gate", "capacity"]

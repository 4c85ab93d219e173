"""Sliders that are moved while a prompt is sampling."""

from __future__ import annotations

import itertools
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import expect

from demo.server import ApiGraph
from tests.browser.driver import Comfy

STOP, STEPS = 3, 6  # the model stops in its third evaluation
TOP_K = 2
TESTS = itertools.count()


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def graph(top_k: int = TOP_K) -> ApiGraph:
    """Top-K on a model that stops under way."""
    return {
        "1": node("D2MLoadFluxMoE", model_name="emoji-flux-moe.safetensors", weight_dtype="default"),
        "2": node("D2MTopK", model=["1", 0], top_k=top_k, gate="as in the file", capacity=1.0),
        "3": node("TestGate", model=["2", 0], stop_at=STOP, test=next(TESTS)),
        "4": node("D2MEmojiPrompt", text="fox in the centre on blue", guidance=3.5),
        "5": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "6": node(
            "KSampler", model=["3", 0], seed=7, steps=STEPS, cfg=1.0, sampler_name="euler", scheduler="simple",
            denoise=1.0, positive=["4", 0], negative=["4", 0], latent_image=["5", 0],
        ),
        "7": node("VAELoader", vae_name="emoji-autoencoder.safetensors"),
        "8": node("VAEDecode", samples=["6", 0], vae=["7", 0]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="live"),
    }  # fmt: skip


def saved(comfy: Comfy, entry: dict[str, Any]) -> Path:
    (file,) = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    return comfy.server.base / "output" / file["subfolder"] / file["filename"]


def logged(comfy: Comfy, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of the one run in the metadata of the image."""
    with Image.open(saved(comfy, entry)) as image:
        (run,) = json.loads(image.info["d2m_log"])
    return list(run["evaluations"])


def changed_at(evaluations: list[dict[str, Any]], to: int) -> bool:
    return [it["top_k"] for it in evaluations] == [TOP_K] * STOP + [to] * (STEPS - STOP)


def start(comfy: Comfy) -> str:
    """Queue, and wait until the model stands in its third evaluation."""
    prompt = comfy.queue()
    comfy.wait_at_gate()
    comfy.wait_until_started(prompt)
    return prompt


def finish(comfy: Comfy, prompt: str) -> list[dict[str, Any]]:
    comfy.open_gate()
    return logged(comfy, comfy.wait(prompt))


def picture(comfy: Comfy, entry: dict[str, Any]) -> np.ndarray:
    with Image.open(saved(comfy, entry)) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def sent(comfy: Comfy) -> list[dict[str, Any]]:
    """Return a list that collects what the page sends from now on."""
    requests: list[dict[str, Any]] = []
    comfy.page.on("request", lambda it: requests.append(it.post_data_json) if it.url.endswith("/d2m/live") else None)
    return requests


def a_while(comfy: Comfy) -> None:
    """Long enough for the page to have looked at the widgets several times."""
    comfy.page.wait_for_timeout(1000)


def test_a_slider_moved_during_a_run_is_used_from_the_next_evaluation(comfy: Comfy) -> None:
    comfy.build(graph())
    comfy.show_all()
    prompt = start(comfy)
    answer = comfy.slide_live(2, "top_k", 5)
    assert answer["applied"]
    assert answer["prompt_id"] == prompt
    assert "live" in comfy.readout(2)
    evaluations = finish(comfy, prompt)
    assert changed_at(evaluations, 5)
    newest = comfy.server.get("/d2m/log")["runs"][0]
    assert newest["prompt_id"] == prompt
    assert newest["evaluations"] == evaluations
    comfy.page.wait_for_function(
        "() => !app.rootGraph.getNodeById(2).widgets.at(-1).element.innerText.includes('live')"
    )


def test_after_a_live_change_the_queue_gives_what_the_widgets_say(comfy: Comfy) -> None:
    comfy.build(graph())
    prompt = start(comfy)
    comfy.live(lambda: comfy.set_widget(2, "top_k", 5))
    finish(comfy, prompt)
    under_way = picture(comfy, comfy.wait(prompt))
    pictures = {}
    for top_k in (5, TOP_K):
        comfy.set_widget(2, "top_k", top_k)
        comfy.open_gate()
        entry = comfy.wait(comfy.queue())
        assert [it["top_k"] for it in logged(comfy, entry)] == [top_k] * STEPS
        pictures[top_k] = picture(comfy, entry)
    assert not np.array_equal(pictures[5], pictures[TOP_K])
    assert not any(np.array_equal(under_way, later) for later in pictures.values())


def test_a_pending_prompt_keeps_the_values_that_it_was_queued_with(comfy: Comfy) -> None:
    comfy.build(graph())
    first = start(comfy)
    comfy.set_widget(9, "filename_prefix", "pending")
    comfy.set_widget(6, "seed", 8)
    second = comfy.queue()
    comfy.live(lambda: comfy.set_widget(2, "top_k", 5))
    assert changed_at(finish(comfy, first), 5)
    requests = sent(comfy)
    comfy.open_gate()
    assert [it["top_k"] for it in logged(comfy, comfy.wait(second))] == [TOP_K] * STEPS
    assert requests == []


def test_what_is_changed_in_another_workflow_stays_there(comfy: Comfy) -> None:
    comfy.build(graph(top_k=4))
    other = comfy.workflow()
    comfy.build(graph())
    workflow = comfy.workflow()
    comfy.load(workflow)
    prompt = start(comfy)
    requests = sent(comfy)
    comfy.load({**other, "id": workflow["id"]})  # such as the same template in another tab
    a_while(comfy)
    comfy.set_widget(2, "top_k", 9)
    a_while(comfy)
    assert [it["top_k"] for it in finish(comfy, prompt)] == [TOP_K] * STEPS
    assert requests == []


def test_a_slider_inside_a_subgraph(comfy: Comfy) -> None:
    comfy.build(graph())
    host = comfy.into_subgraph([2])
    comfy.js("id => app.canvas.setGraph(app.rootGraph.getNodeById(id).subgraph)", host)
    comfy.show_all()
    prompt = start(comfy)
    answer = comfy.slide_live(2, "top_k", 5)
    assert answer["sent"]["nodes"] == [f"{host}:2"]
    assert answer["applied"]
    assert changed_at(finish(comfy, prompt), 5)


def test_a_promoted_slider_on_a_subgraph_node(comfy: Comfy) -> None:
    comfy.build(graph())
    host = comfy.into_subgraph([2], promote=(2, "top_k"))
    comfy.show_all()
    prompt = start(comfy)
    answer = comfy.slide_live(host, "top_k", 5)
    assert answer["sent"]["nodes"] == [f"{host}:2"]
    assert answer["applied"]
    assert changed_at(finish(comfy, prompt), 5)


def test_every_instance_of_a_subgraph_hears_of_its_inner_slider(comfy: Comfy) -> None:
    comfy.build(graph())
    host = comfy.into_subgraph([2])
    other = comfy.js(
        """id => {
            const host = app.rootGraph.getNodeById(id), other = LiteGraph.createNode(host.type);
            app.rootGraph.add(other);
            app.rootGraph.getNodeById(1).connect(0, other, 0);
            other.connect(0, host, 0);
            return other.id;
        }""",
        host,
    )
    comfy.js("id => app.canvas.setGraph(app.rootGraph.getNodeById(id).subgraph)", host)
    prompt = start(comfy)
    answer = comfy.live(lambda: comfy.set_widget(2, "top_k", 5))
    assert sorted(answer["sent"]["nodes"]) == sorted([f"{host}:2", f"{other}:2"])
    assert changed_at(finish(comfy, prompt), 5)


def test_a_rule_is_sent_when_it_is_written_and_an_error_is_shown(comfy: Comfy) -> None:
    drawn = graph()
    drawn["10"] = node("D2MExpertMask", model=["2", 0], mask="")
    drawn["3"]["inputs"]["model"] = ["10", 0]
    comfy.build(drawn)
    prompt = start(comfy)
    requests = sent(comfy)

    def write(text: str) -> None:
        for end in range(1, len(text) + 1):
            comfy.set_widget(10, "mask", text[:end])

    assert comfy.live(lambda: write("single_blocks.*: 0=0"))["applied"]
    assert comfy.live(lambda: write("single_blocks.*: 0=much"))["status"] == 400
    toast = comfy.page.locator(".p-toast-message").filter(has_text="much")
    expect(toast).to_be_visible()
    assert [it["values"] for it in requests] == [{"mask": "single_blocks.*: 0=0"}, {"mask": "single_blocks.*: 0=much"}]
    evaluations = finish(comfy, prompt)
    assert ["mask" in it for it in evaluations] == [False] * STOP + [True] * (STEPS - STOP)


def test_a_reload_keeps_the_graph_and_the_run_can_still_be_steered(comfy: Comfy) -> None:
    comfy.build(graph())
    comfy.load({**comfy.workflow(), "id": str(uuid.uuid4())})
    comfy.set_widget(2, "top_k", 3)
    before = comfy.prompt()
    comfy.set_widget(2, "top_k", TOP_K)
    prompt = start(comfy)
    comfy.set_widget(2, "top_k", 3)
    comfy.keep()
    comfy.page.reload()
    comfy.wait_until_ready()
    comfy.page.wait_for_function("() => app.rootGraph.nodes.length === 9")
    assert comfy.prompt() == before
    a_while(comfy)
    assert comfy.live(lambda: comfy.set_widget(2, "top_k", 5))["applied"]
    assert [it["top_k"] for it in finish(comfy, prompt)][-1] == 5

"""Live values, caching, logs and replays through the API of a running ComfyUI."""

from __future__ import annotations

import copy
import io
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.server import ApiGraph, ComfyServer, ServerError
from tests.comfyui.serving import node, sampling

STEPS = 60
SIZE = 64


def graph_of(steps: int = 3, seed: int = 1, **controls: tuple[str, dict[str, Any]]) -> ApiGraph:
    """Controls in a chain behind the loader, and the image `image`."""
    graph: ApiGraph = {"loader": node("D2MLoadFluxMoE", model_name="grouped.safetensors", weight_dtype="default")}
    last = "loader"
    for name, (class_type, widgets) in controls.items():
        graph[name] = node(class_type, model=[last, 0], **widgets)
        last = name
    sampling(graph, "image", [last, 0], seed=seed, steps=steps, size=SIZE)
    return graph


def top_k(value: int) -> tuple[str, dict[str, Any]]:
    return ("D2MTopK", {"top_k": value, "gate": "as in the file", "capacity": 1.0})


def png(server: ComfyServer, entry: dict[str, Any], name: str = "image") -> Image.Image:
    (item,) = entry["outputs"][name]["images"]
    data = server.get("/view", filename=item["filename"], subfolder=item["subfolder"], type=item["type"])
    return Image.open(io.BytesIO(data))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def log_of(image: Image.Image) -> list[dict[str, Any]]:
    return json.loads(image.info["d2m_log"])


def of_run(run: dict[str, Any], setting: str) -> list:
    return [entry[setting] for entry in run["evaluations"]]


def cached(entry: dict[str, Any]) -> set[str]:
    (found,) = (data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached")
    return set(found)


def until(server: ComfyServer, prompt: str, holds: Callable[[list], bool]) -> None:
    """Wait until the newest log is this prompt's and its evaluations are as asked."""
    for _ in range(1200):
        runs = server.get("/d2m/log")["runs"]
        if runs and runs[0]["prompt_id"] == prompt and holds(runs[0]["evaluations"]):
            return
        if prompt in server.get(f"/history/{prompt}"):
            server.wait(prompt)  # says what failed
            break
        time.sleep(0.05)
    raise AssertionError(f"The log did not come so far:\n{server.log_tail()}")


def run_live(server: ComfyServer, graph: ApiGraph, *moves: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Queue, move widgets of nodes one after the other while it samples, and wait."""
    prompt = server.queue(graph)
    until(server, prompt, lambda evaluations: len(evaluations) >= 2)
    for name, values in moves:
        answer = server.post("/d2m/live", {"nodes": [name], "values": values})
        assert (answer["applied"], answer["prompt_id"]) == (True, prompt)
        made = len(server.get("/d2m/log")["runs"][0]["evaluations"])
        until(server, prompt, lambda evaluations, made=made: len(evaluations) >= made + 2)
    return server.wait(prompt)


def test_a_replay_of_a_live_run_paints_the_same_image(server: ComfyServer, tmp_path: Path) -> None:
    """The whole way: a long run, sliders in a subgraph moved while it samples, the PNG, an upload, the replay."""
    controls = {
        "12:5": top_k(2),
        "12:7": ("D2MActiveBlocks", {"active_blocks": 1, "per_group": ""}),
        "mask": ("D2MExpertMask", {"mask": ""}),
    }
    graph = graph_of(STEPS, **controls)
    entry = run_live(
        server, graph, ("12:5", {"top_k": 7}), ("mask", {"mask": "single_blocks.*: 0=0, 3=2"}), ("12:7", {"active_blocks": 3})
    )  # fmt: skip
    image = png(server, entry)
    (run,) = log_of(image)
    assert run["node"] == "image sampler"
    assert len(run["evaluations"]) == STEPS
    assert of_run(run, "top_k")[0] == 2
    assert of_run(run, "top_k")[-1] == 7
    assert run["evaluations"][-1]["active_blocks"] == [3, 3]
    assert "mask" in run["evaluations"][-1]
    assert "mask" not in run["evaluations"][0]

    shutil.copyfile(
        server.base / "output" / entry["outputs"]["image"]["images"][0]["filename"], server.base / "input" / "live.png"
    )
    replay = graph_of(STEPS, replay=("D2MReplay", {"image": "live.png", "run": 0, "log": ""}))
    again = png(server, server.wait(server.queue(replay)))
    assert np.array_equal(pixels(again), pixels(image))
    assert of_run(log_of(again)[0], "top_k") == of_run(run, "top_k")

    unmoved = png(server, server.wait(server.queue(graph)))
    assert np.abs(pixels(unmoved).astype(int) - pixels(image)).max() > 3


def test_after_a_live_change_the_queue_gives_what_the_widgets_say(server: ComfyServer) -> None:
    """Even where the slider went back to where it was when the prompt was queued."""
    graph = graph_of(STEPS, seed=2, k=top_k(2))
    live = run_live(server, graph, ("k", {"top_k": 9}), ("k", {"top_k": 2}))
    assert {2, 9} == set(of_run(log_of(png(server, live))[0], "top_k"))
    again = server.wait(server.queue(graph))
    assert "image sampler" not in cached(again)
    assert of_run(log_of(png(server, again))[0], "top_k") == [2] * STEPS
    assert not np.array_equal(pixels(png(server, live)), pixels(png(server, again)))

    unchanged = server.wait(server.queue(graph))
    assert {"k", "image sampler", "image"} <= cached(unchanged)


def test_a_second_prompt_of_the_same_id_begins_with_its_own_values(server: ComfyServer) -> None:
    """A client may number its jobs itself and clear the history."""
    mine = {"prompt_id": "0b5e29b3-6a9c-4e1c-9a4e-0c1f4d8f5a11"}

    def queue(seed: int) -> str:
        return server.post("/prompt", {"prompt": graph_of(STEPS, seed=seed, k=top_k(2)), **mine})["prompt_id"]

    prompt = queue(21)
    until(server, prompt, lambda evaluations: len(evaluations) >= 2)
    assert server.post("/d2m/live", {"nodes": ["k"], "values": {"top_k": 9}})["prompt_id"] == prompt
    assert of_run(log_of(png(server, server.wait(prompt)))[0], "top_k")[-1] == 9
    server.post("/history", {"delete": [prompt]})
    assert queue(22) == prompt == mine["prompt_id"]
    (run,) = log_of(png(server, server.wait(prompt)))
    assert of_run(run, "top_k") == [2] * STEPS


def test_a_body_that_is_nested_too_deeply_is_refused(server: ComfyServer) -> None:
    request = urllib.request.Request(f"{server.address}/d2m/live", data=b"[" * 100_000, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 400
    assert "The body is not JSON" in json.load(refused.value)["error"]


def test_an_animated_webp_replays(server: ComfyServer) -> None:
    """ComfyUI writes the metadata into EXIF instead of PNG text."""
    graph = graph_of(3, seed=23, k=top_k(5))
    images = graph["image"]["inputs"]["images"]
    graph["image"] = node(
        "SaveAnimatedWEBP", images=images, filename_prefix="webp", fps=6.0, lossless=True, quality=80, method="default"
    )
    queued = {"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": {"id": "mine"}}}}
    entry = server.wait(server.post("/prompt", queued)["prompt_id"])
    (item,) = entry["outputs"]["image"]["images"]
    shutil.copyfile(server.base / "output" / item["filename"], server.base / "input" / "moving.webp")
    replay = graph_of(3, seed=23, replay=("D2MReplay", {"image": "moving.webp", "run": 0, "log": ""}))
    again = png(server, server.wait(server.queue(replay)))
    assert of_run(log_of(again)[0], "top_k") == [5] * 3
    assert np.array_equal(pixels(again), pixels(png(server, entry)))


def test_a_pending_prompt_keeps_what_it_was_queued_with(server: ComfyServer) -> None:
    first, second = graph_of(STEPS, seed=3, k=top_k(2)), graph_of(4, seed=4, k=top_k(3))
    running = server.queue(first)
    until(server, running, lambda evaluations: len(evaluations) >= 2)
    pending = server.queue(second)
    assert server.post("/d2m/live", {"nodes": ["k"], "values": {"top_k": 8}})["prompt_id"] == running
    assert of_run(log_of(png(server, server.wait(running)))[0], "top_k")[-1] == 8
    assert of_run(log_of(png(server, server.wait(pending)))[0], "top_k") == [3] * 4


def test_the_log_is_in_the_metadata_when_only_the_image_is_saved_again(server: ComfyServer) -> None:
    graph = graph_of(STEPS, seed=5, k=top_k(2))
    server.wait(server.queue(graph))
    live = run_live(server, graph_of(STEPS, seed=6, k=top_k(2)), ("k", {"top_k": 5}))
    expected = log_of(png(server, live))

    renamed = graph_of(
        STEPS, seed=6, k=top_k(2)
    )  # what the widgets say now is made anew, and then comes from the cache
    first = server.wait(server.queue(renamed))
    renamed["image"]["inputs"]["filename_prefix"] = "renamed"
    second = server.wait(server.queue(renamed))
    assert "image sampler" in cached(second)
    assert log_of(png(server, second)) == log_of(png(server, first)) != expected
    assert of_run(log_of(png(server, second))[0], "top_k") == [2] * STEPS


def test_several_samplers_have_their_entries_and_a_workflow_is_kept(server: ComfyServer) -> None:
    graph = graph_of(2, seed=7, k=top_k(2))
    graph["other"] = node("D2MTopK", model=["loader", 0], top_k=5, gate="as in the file")
    sampling(graph, "second", ["other", 0], steps=3, size=SIZE)
    queued = {"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": {"id": "mine"}}}}
    entry = server.wait(server.post("/prompt", queued)["prompt_id"])
    logs = [log_of(png(server, entry, name)) for name in ("image", "second")]
    longest = max(logs, key=len)
    assert {run["node"]: of_run(run, "top_k") for run in longest} == {
        "image sampler": [2] * 2,
        "second sampler": [5] * 3,
    }
    assert json.loads(png(server, entry).info["workflow"]) == {"id": "mine"}
    newest = server.get("/d2m/log")["runs"][:2]
    assert {run["node"] for run in newest} == {"image sampler", "second sampler"}
    assert all(run["finished"] for run in newest)


def test_a_prompt_without_controls_has_no_log(server: ComfyServer) -> None:
    image = png(server, server.wait(server.queue(graph_of(1, seed=8))))
    assert "d2m_log" not in image.info


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"nodes": ["k"], "values": {"top_k": "3"}}, "expected a whole number from 0 to 64"),
        ({"nodes": ["k"], "values": {"colour": 3}}, "values has 'colour'"),
        ({"nodes": "k", "values": {"top_k": 3}}, "nodes is missing or wrong"),
        ({"nodes": ["k"], "values": {"mask": "x" * 300_000}}, "expected 200000 at most"),
    ],
)
def test_a_bad_live_value_is_refused(server: ComfyServer, body: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        server.post("/d2m/live", body)


def test_without_a_prompt_a_live_value_waits_for_the_queue(server: ComfyServer) -> None:
    answer = server.post("/d2m/live", {"nodes": ["k"], "values": {"top_k": 3}})
    assert (answer["applied"], answer["prompt_id"]) == (False, None)


def test_a_replay_says_what_is_wrong_with_its_image(server: ComfyServer) -> None:
    Image.new("RGB", (8, 8)).save(server.base / "input" / "plain.png")
    graph = graph_of(1, replay=("D2MReplay", {"image": "plain.png", "run": 0, "log": ""}))
    with pytest.raises(ServerError, match=r"D2MReplay.*plain\.png has no FLUX-MoE log in its metadata"):
        server.run(graph)
    for outside in ("../comfyui.log", "nowhere.png"):
        graph = copy.deepcopy(graph)
        graph["replay"]["inputs"]["image"] = outside
        with pytest.raises(ServerError, match="There is no image"):
            server.run(graph)
    offered = server.get("/object_info/D2MReplay")["D2MReplay"]["input"]["optional"]["image"]
    assert "plain.png" in offered[1]["options"]
    assert offered[1]["image_upload"]

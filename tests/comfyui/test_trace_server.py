"""Traces through the API of a running ComfyUI: what is served, what is refused, and what ComfyUI's cache makes of it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from demo.server import ApiGraph, ComfyServer, ServerError
from tests.comfyui.serving import node, sampling, write_base

SIZE, STEPS = 64, 3
PATCHES, TEXT = (SIZE // 16) ** 2, 7


def graph_of(seed: int = 1, **widgets: Any) -> ApiGraph:
    graph: ApiGraph = {
        "loader": node("D2MLoadFluxMoE", model_name="emoji-flux-moe.safetensors", weight_dtype="default"),
        "tracing": node("D2MTraceRouting", model=["loader", 0]),
    }
    sampling(graph, "image", ["tracing", 0], seed=seed, steps=STEPS, size=SIZE)
    settings = {
        "step": -1,
        "block": -1,
        "prompt": "positive",
        "opacity": 0.75,
        "numbers": True,
        "legend": True,
        **widgets,
    }
    graph["map"] = node("D2MExpertMap", trace=["tracing", 1], image=["image image", 0], **settings)
    graph["saved map"] = node("SaveImage", images=["map", 0], filename_prefix="map")
    return graph


def run(server: ComfyServer, graph: ApiGraph) -> tuple[str, dict[str, Any], set[str]]:
    """The id of the trace that the map shows, what the map said, and the nodes that ComfyUI took from its cache."""
    # As a page queues it: ComfyUI 0.18 repeats what a cached node said for a client alone.
    entry = server.wait(server.post("/prompt", {"prompt": graph, "client_id": "a page"})["prompt_id"])
    (said,) = entry["outputs"]["map"]["d2m_map"]
    cached = next(data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached")
    return said["traces"][0], said, set(cached)


def request(
    server: ComfyServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, Mapping[str, str], bytes]:
    asked = urllib.request.Request(f"{server.address}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_a_map_names_a_trace_that_the_page_can_read(server: ComfyServer) -> None:
    shown, said, _ = run(server, graph_of(seed=11))
    status, headers, body = request(server, f"/d2m/traces/{shown}")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "application/json")
    described = json.loads(body)
    assert described["id"] == shown
    assert (described["grid"], described["text_tokens"]) == ({"height": 4, "width": 4}, TEXT)
    assert len(described["steps"]) == STEPS
    tokens = {"img": PATCHES, "txt": TEXT, "joint": TEXT + PATCHES}
    expected = sum(tokens[layer["stream"]] * (2 * described["slots"] + 1) for layer in described["layers"])
    for step in range(STEPS):
        status, headers, body = request(server, f"/d2m/traces/{shown}/steps/{step}/samples/0")
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
        assert len(body) == expected
    (image,) = said["images"]
    status, headers, body = request(
        server, f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type=temp"
    )
    assert (status, body[:4]) == (200, b"\x89PNG")


def test_a_browser_that_has_a_trace_is_told_whether_it_still_holds(server: ComfyServer) -> None:
    shown, _, _ = run(server, graph_of(seed=12))
    for path in (f"/d2m/traces/{shown}", f"/d2m/traces/{shown}/steps/1/samples/0"):
        status, headers, _ = request(server, path)
        assert status == 200
        status, again, body = request(server, path, **{"If-None-Match": headers["ETag"]})
        assert (status, body) == (304, b"")
        assert again["ETag"] == headers["ETag"]
        assert "no-cache" in again["Cache-Control"]
    assert request(server, f"/d2m/traces/{shown}", "DELETE")[0] == 204
    assert request(server, f"/d2m/traces/{shown}", **{"If-None-Match": f'"{shown}"'})[0] == 404


@pytest.mark.parametrize(
    ("path", "method", "status", "words"),
    [
        ("abc", "GET", 400, "not the id of a trace"),
        ("abc", "DELETE", 400, "not the id of a trace"),
        ("..%2F..%2Fetc%2Fpasswd", "GET", 400, "not the id of a trace"),
        ("A" * 22, "GET", 404, "does not exist (any more)"),
        ("A" * 22, "DELETE", 404, "does not exist (any more)"),
        ("A" * 22 + "/steps/0/samples/0", "GET", 404, "does not exist (any more)"),
        ("ID/steps/3/samples/0", "GET", 404, "step is 3, but this trace has 3 of them"),
        ("ID/steps/0/samples/1", "GET", 404, "sample is 1, but this trace has 1 of them"),
        ("ID/steps/-1/samples/0", "GET", 400, "step is '-1'; expected a number from 0"),
        ("ID/steps/0/samples/1e3", "GET", 400, "sample is '1e3'; expected a number"),
        ("ID/steps/999999999999/samples/0", "GET", 400, "expected a number"),
    ],
)
def test_what_is_no_trace_is_refused_with_a_reason(
    server: ComfyServer, path: str, method: str, status: int, words: str
) -> None:
    shown, _, _ = run(server, graph_of(seed=13))
    found, headers, body = request(server, f"/d2m/traces/{path.replace('ID', shown)}", method)
    assert found == status
    assert headers["Content-Type"].startswith("application/json")
    assert words in json.loads(body)["error"]


def test_another_step_of_the_map_does_not_sample_again(server: ComfyServer) -> None:
    shown, _, _ = run(server, graph_of(seed=14))
    again, _, cached = run(server, graph_of(seed=14, step=0))
    assert again == shown
    assert {"tracing", "image sampler"} <= cached
    assert "map" not in cached


def test_the_map_shows_the_run_of_its_image(server: ComfyServer) -> None:
    first, _, _ = run(server, graph_of(seed=15))
    choices = request(server, f"/d2m/traces/{first}/steps/2/samples/0")[2]
    second, _, cached = run(server, graph_of(seed=16))
    assert "tracing" in cached
    assert "image sampler" not in cached
    assert second != first
    assert request(server, f"/d2m/traces/{second}/steps/2/samples/0")[2] != choices
    third, _, _ = run(server, graph_of(seed=15))
    assert request(server, f"/d2m/traces/{third}/steps/2/samples/0")[2] == choices


def test_a_trace_that_was_freed_is_recorded_anew_when_the_same_workflow_is_queued(server: ComfyServer) -> None:
    shown, _, _ = run(server, graph_of(seed=17))
    choices = request(server, f"/d2m/traces/{shown}/steps/0/samples/0")[2]
    same, _, cached = run(server, graph_of(seed=17))
    assert same == shown
    assert "map" in cached
    assert request(server, f"/d2m/traces/{shown}", "DELETE")[0] == 204
    assert request(server, f"/d2m/traces/{shown}")[0] == 404
    anew, _, cached = run(server, graph_of(seed=17))
    assert anew != shown
    assert "image sampler" not in cached
    assert request(server, f"/d2m/traces/{anew}/steps/0/samples/0")[2] == choices
    last, _, cached = run(server, graph_of(seed=17))  # and then is at rest
    assert last == anew
    assert {"tracing", "image sampler", "map"} <= cached


def test_an_older_image_from_a_cache_of_many_results_gets_its_own_trace(tmp_path: Path) -> None:
    write_base(tmp_path, models=False)
    with ComfyServer(tmp_path, arguments=("--cpu", "--cache-lru", "100")) as running:
        first, _, _ = run(running, graph_of(seed=19))
        path = "steps/2/samples/0"
        choices = request(running, f"/d2m/traces/{first}/{path}")[2]
        run(running, graph_of(seed=20))
        assert request(running, f"/d2m/traces/{first}", "DELETE")[0] == 204  # as the page does: it shows another now
        again, _, cached = run(running, graph_of(seed=19))
        assert "image sampler" in cached
        assert request(running, f"/d2m/traces/{again}/{path}")[2] == choices
        other, _, cached = run(running, graph_of(seed=19, step=0))  # the run of seed 20 was the last
        assert "image sampler" in cached
        assert request(running, f"/d2m/traces/{other}/{path}")[2] == choices


def test_a_map_that_nothing_makes_wait_says_what_to_connect(server: ComfyServer) -> None:
    graph = graph_of(seed=18)
    del graph["map"]["inputs"]["image"]
    with pytest.raises(ServerError, match=r"D2MExpertMap.*has to wait for the sampler: connect image"):
        server.run(graph)

"""GET /d2m/cost: the numbers of `python -m d2m_train report`, of files and of what nodes have made; in a real server."""

from __future__ import annotations

import json
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from d2m_model.checkpoint import check_file
from d2m_model.tensor_file import TensorFile
from d2m_train.__main__ import main
from demo.server import ApiGraph, ComfyServer, ServerError
from tests.comfyui.serving import node, sampling


def cost(server: ComfyServer, **query: Any) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/d2m/cost", **{name: str(value) for name, value in query.items()})
    return found


def reported(server: ComfyServer, capsys: pytest.CaptureFixture, preset: str, *options: str) -> dict[str, Any]:
    dense = server.base / "models" / "diffusion_models" / "dense.safetensors"
    assert main(["report", "--model", str(dense), "--preset", preset, "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("preset", ["L", "M", "XS"])
@pytest.mark.parametrize(
    ("query", "options"),
    [
        ({}, ()),
        ({"top_k": 5}, ("--top-k", "5")),
        ({"top_k": 0, "width": 512, "height": 768, "text_tokens": 256},
         ("--top-k", "0", "--image-tokens", "1536", "--text-tokens", "256")),
    ],
)  # fmt: skip
def test_it_is_what_the_report_says(
    server: ComfyServer, capsys: pytest.CaptureFixture, preset: str, query: dict, options: tuple[str, ...]
) -> None:
    row = reported(server, capsys, preset, *options)
    found = cost(server, model_name=f"{preset}.safetensors", **query)
    names = {"total": "total_params", "touched": "touched_params", "paper": "paper_params", "flops": "flops"}
    assert {name: found[name] for name in names} == {name: row[of] for name, of in names.items()}
    assert found["flops_ratio"] == row["flops_ratio"] < 1


def test_it_is_said_in_words_too(server: ComfyServer) -> None:
    found = cost(server, model_name="L.safetensors")
    assert found["of"] == "L.safetensors"
    assert f"{found['touched'] / 1e6:.2f} of {found['dense']['touched'] / 1e6:.2f} M parameters" in found["text"]
    assert "1024 × 1024 pixels and 512 text tokens" in found["text"]


def test_a_dense_file_costs_what_it_costs(server: ComfyServer) -> None:
    found = cost(server, model_name="dense.safetensors", top_k=3)
    assert found["flops_ratio"] == 1
    assert found["touched"] == found["dense"]["touched"] == found["total"]


def test_active_blocks_count_as_the_model_runs_them(server: ComfyServer) -> None:
    def flops(**query: Any) -> int:
        return int(cost(server, model_name="groups.safetensors", **query)["flops"])

    assert cost(server, model_name="groups.safetensors")["groups"] == [3, 5]
    assert flops() == flops(active_blocks="1,2")
    assert flops(active_blocks=4) == flops(active_blocks="3,4")
    double, single = (flops(active_blocks=asked) - flops(active_blocks="0,0") for asked in ("1,0", "0,1"))
    assert flops(active_blocks="3,5") == pytest.approx(flops(active_blocks="0,0") + 3 * double + 5 * single, abs=10)
    assert flops(active_blocks=0) < flops(active_blocks=1)


def test_capacity_is_the_files_own_none_or_an_estimate_that_says_so(server: ComfyServer) -> None:
    def asked(**query: Any) -> dict[str, Any]:
        return cost(server, model_name="capacity.safetensors", **query)

    own, none, half, twice = asked(), asked(capacity=0), asked(capacity=0.5), asked(capacity=2)
    assert none["flops"] < half["flops"] < own["flops"] < twice["flops"] < own["dense"]["flops"] * 1.05
    assert "3 experts a token" in own["text"]
    assert "estimate" not in own["text"] + none["text"]
    assert "an estimate: about" in twice["text"]
    assert asked(top_k=7)["flops"] == own["flops"]  # which such a file does not have


def test_a_file_that_was_replaced_is_read_anew(server: ComfyServer) -> None:
    models = server.base / "models" / "diffusion_models"
    (models / "changing.safetensors").write_bytes((models / "L.safetensors").read_bytes())
    before = cost(server, model_name="changing.safetensors")
    time.sleep(0.02)
    (models / "changing.safetensors").write_bytes((models / "dense.safetensors").read_bytes())
    assert cost(server, model_name="changing.safetensors")["flops"] == before["dense"]["flops"]


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ({}, 400, "Give model_name .* or node"),
        ({"model_name": "L.safetensors", "node": "1"}, 400, "not both"),
        ({"model_name": "nowhere.safetensors"}, 404, r"There is no nowhere\.safetensors"),
        ({"model_name": "../diffusion_models/L.safetensors"}, 404, "There is no"),
        ({"model_name": "broken.safetensors"}, 400, "broken"),
        ({"node": "99:1"}, 404, "Node 99:1 has given no FLUX-MoE yet. Queue the workflow"),
        ({"model_name": "L.safetensors", "top_k": "13"}, 400, "top_k is '13'; expected a whole number, 0 to 12"),
        ({"model_name": "L.safetensors", "top_k": "two"}, 400, "top_k is 'two'"),
        ({"model_name": "L.safetensors", "width": "99999999999999"}, 400, "width is .*16 to 16384"),
        ({"model_name": "groups.safetensors", "active_blocks": "1,2,3"}, 400, "a list of 2, one for each block group"),
        ({"model_name": "groups.safetensors", "active_blocks": "many"}, 400, "active_blocks is 'many'"),
        ({"model_name": "capacity.safetensors", "capacity": "nan"}, 400, "capacity is 'nan'"),
        ({"model_name": "capacity.safetensors", "capacity": "-1"}, 400, "capacity is '-1'"),
    ],
)
def test_a_wrong_question_is_answered_with_what_is_wrong(
    server: ComfyServer, query: dict[str, str], status: int, message: str
) -> None:
    import re

    with pytest.raises(urllib.error.HTTPError) as refused:
        cost(server, **query)
    assert refused.value.code == status
    assert re.search(message, json.loads(refused.value.read())["error"])


# The conversion, through the API


def convert_node(**changes: Any) -> dict[str, Any]:
    given = {
        "model": ["dense", 0], "preset": "L", "split_only": False, "samples": 2, "steps": 2, "size": 128, "seed": 0,
        "top_k": 2, "router": "top_k", "block_routers": "random",
    }  # fmt: skip
    return node("D2MConvertFlux", **given | changes)


def graph_of(**changes: Any) -> ApiGraph:
    """Load, convert, save."""
    return {
        "dense": node("UNETLoader", unet_name="dense.safetensors", weight_dtype="default"),
        "moe": convert_node(**changes),
        "save": node("D2MSaveFluxMoE", model=["moe", 0], filename_prefix="diffusion_models/converted"),
    }


def saved(server: ComfyServer, graph: ApiGraph) -> Path:
    (name,) = server.wait(server.queue(graph))["outputs"]["save"]["text"]
    return server.base / "output" / name


def test_what_a_node_has_made_has_its_cost_and_is_the_command_lines(
    server: ComfyServer, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    graph = graph_of()
    graph["6:1"] = graph.pop("moe")  # as within a subgraph
    graph["save"]["inputs"]["model"] = ["6:1", 0]
    file = saved(server, graph)
    row = reported(server, capsys, "L")
    found = cost(server, node="6:1")
    assert found["touched"] == row["touched_params"]
    # Another workflow may have a node of this id: so what the answer is of is said.
    assert found["of"] == "what node 6:1 gave last: preset L of dense"
    assert found["of"] in found["text"]
    assert "FLUX-MoE of node 6:1: " in server.log.read_text()
    dense, out = server.base / "models" / "diffusion_models" / "dense.safetensors", tmp_path / "moe.safetensors"
    assert main(["convert", "--teacher", str(dense), "--out", str(out)]) == 0
    with TensorFile(file) as found, TensorFile(out) as expected:
        assert set(found.shapes) == set(expected.shapes)
        assert all(bytes(found.tensor(n).numpy()) == bytes(expected.tensor(n).numpy()) for n in found.shapes)


def test_converted_once_it_comes_from_the_cache(server: ComfyServer) -> None:
    graph = graph_of(seed=5)
    saved(server, graph)
    graph["save"]["inputs"]["filename_prefix"] = "diffusion_models/again"
    graph["other id"] = graph.pop("moe")
    graph["save"]["inputs"]["model"] = ["other id", 0]
    entry = server.wait(server.queue(graph))
    (cached,) = [data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached"]
    assert "other id" in cached
    assert cost(server, node="other id")["touched"] == cost(server, node="moe")["touched"]
    body = {"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": {"id": "its own"}}}}
    server.wait(server.post("/prompt", body)["prompt_id"])
    assert cost(server, node="other id", workflow="its own")["experts"] == 12
    with pytest.raises(urllib.error.HTTPError, match="404"):  # another workflow's node of this id has not run
        cost(server, node="other id", workflow="another")


def test_combined_prompts_calibrate_it(server: ComfyServer) -> None:
    graph = graph_of(preset="XS", samples=4, calibration=["both", 0], block_routers="fitted to the prompts")
    graph |= {
        "dense": node("UNETLoader", unet_name="few-blocks.safetensors", weight_dtype="default"),
        "one": node("TinyConditioning", seed=1),
        "two": node("TinyConditioning", seed=2),
        "both": node("ConditioningCombine", conditioning_1=["one", 0], conditioning_2=["two", 0]),
    }
    config = check_file(saved(server, graph))
    assert config.provenance["data"]["name"] == "2 prompts in ComfyUI"
    assert config.provenance["block_router"] == "ridge"
    found = cost(server, node="moe")
    assert found["groups"] == [group.blocks for group in config.groups]
    assert found["of"] == "what node moe gave last: preset XS of few-blocks, calibrated with 2 prompts in ComfyUI"


def test_cancelled_it_leaves_no_file(server: ComfyServer) -> None:
    def there() -> set[Path]:
        return set((server.base / "temp").iterdir())

    before = there()  # of models that may yet go
    graph = graph_of(samples=500, steps=50, calibration=["one", 0]) | {"one": node("TinyConditioning", seed=1)}
    prompt = server.queue(graph)
    while there() <= before:  # until its calibration's folder is there
        time.sleep(0.05)
    server.post("/interrupt", {})
    entry = server.wait(prompt, seconds=120)
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]
    assert there() <= before


def test_files_that_the_cache_holds_go_when_the_user_frees_it(server: ComfyServer) -> None:
    """The message of a full disk recommends this: Edit > Unload Models and Execution Cache."""

    def files_held() -> list[Path]:
        return sorted((server.base / "temp").glob("flux-moe-*.safetensors"))

    saved(server, graph_of(seed=11))
    assert files_held()
    server.post("/free", {"unload_models": True, "free_memory": True})
    for _ in range(3000):
        if not files_held():
            break
        time.sleep(0.1)
    assert files_held() == []


def test_the_converted_model_paints(server: ComfyServer) -> None:
    graph = graph_of(split_only=True)
    del graph["save"]
    graph["k"] = node("D2MTopK", model=["moe", 0], top_k=12, gate="as in the file")
    sampling(graph, "converted", ["k", 0])
    sampling(graph, "teacher", ["dense", 0])
    import numpy as np

    entry = server.wait(server.queue(graph))
    (one,), (other,) = (server.images({"outputs": {name: entry["outputs"][name]}}) for name in ("converted", "teacher"))
    assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_a_model_that_cannot_be_converted_is_said(server: ComfyServer) -> None:
    graph = graph_of()
    graph["dense"] = node("D2MLoadFluxMoE", model_name="L.safetensors", weight_dtype="default")
    with pytest.raises(ServerError, match=r"D2MConvertFlux.*is a FLUX-MoE already"):
        server.run(graph)


def test_the_settings_that_a_file_has_are_named(server: ComfyServer) -> None:
    assert cost(server, model_name="L.safetensors")["settings"] == ["top_k", "gate"]
    assert cost(server, model_name="capacity.safetensors")["settings"] == ["capacity", "gate"]
    dense = cost(server, model_name="dense.safetensors")
    assert (dense["settings"], dense["is_dense"]) == ([], True)


def test_the_loader_offers_flux_moes_first(server: ComfyServer) -> None:
    offered = server.get("/object_info/D2MLoadFluxMoE")["D2MLoadFluxMoE"]["input"]["required"]["model_name"]
    names = offered[1]["options"] if offered[0] == "COMBO" else offered[0]
    assert {"emoji-flux-moe.safetensors", "L.safetensors", "dense.safetensors", "broken.safetensors"} <= set(names)
    first = names.index("broken.safetensors")
    assert {"dense.safetensors", "teacher.safetensors", "emoji-flux.safetensors"} <= set(names[first:])
    assert {"L.safetensors", "capacity.safetensors", "groups.safetensors"} <= set(names[:first])

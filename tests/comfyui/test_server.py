"""Through the API of a running ComfyUI that has this pack as a custom node."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest

from d2m_model.tensor_file import TensorFile
from demo.server import ApiGraph, ComfyServer, ServerError
from demo.template_graphs import TEMPLATES, Template
from tests.comfyui.serving import node, sampling
from tests.toys.wrong_files import WRONG
from tools.host import PACK_NAME, ROOT

WORKFLOWS = ROOT / "example_workflows"
NODES = [
    "D2MLoadFluxMoE", "D2MSaveFluxMoE", "D2MTopK", "D2MActiveBlocks", "D2MSchedule", "D2MExpertMask", "D2MReplay",
    "D2MTraceRouting", "D2MExpertMap", "D2MEmojiPrompt",
]  # fmt: skip


def paint(server: ComfyServer, graph: ApiGraph) -> dict[str, np.ndarray]:
    """Run; the images by the names of their SaveImage nodes."""
    entry = server.wait(server.queue(graph))
    found = {}
    for name, output in entry["outputs"].items():
        (image,) = server.images({"outputs": {name: output}})
        found[name] = np.asarray(image, np.int16)
    return found


def test_the_pack_is_loaded_without_a_warning(server: ComfyServer, startup_log: str) -> None:
    nodes = server.get("/object_info")
    assert set(NODES) <= set(nodes)
    log = startup_log.lower().splitlines()
    about_us = [line for line in log if "dense2moe" in line or "d2m" in line]
    assert about_us
    assert not [line for line in about_us if any(word in line for word in ("warn", "error", "failed", 'file "'))]


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_explains_itself(server: ComfyServer, node_id: str) -> None:
    described = server.get(f"/object_info/{node_id}")[node_id]
    assert described["category"] == "FLUX-MoE"
    assert described["description"]
    assert described["search_aliases"]
    inputs = {**described["input"]["required"], **described["input"].get("optional", {})}
    assert all(options[1].get("tooltip") for options in inputs.values())
    page = server.get(f"/extensions/{PACK_NAME}/docs/{node_id}.md").decode()
    assert page.startswith("# ")
    assert all(f"**{name}**" in page for name in inputs)
    names = server.get("/i18n")
    assert names["en"]["nodeDefs"][node_id]["display_name"] == described["display_name"]
    assert all(set(names[language]["nodeDefs"][node_id]["inputs"]) == set(inputs) for language in ("en", "zh"))


def test_the_example_workflow_paints(server: ComfyServer) -> None:
    graph = json.loads((WORKFLOWS / "api" / "flux-moe-emoji.json").read_text())
    (image,) = server.run(graph)
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 0


def test_samplers_of_one_graph_have_their_own_top_k(server: ComfyServer) -> None:
    graph: ApiGraph = {
        "moe": node("D2MLoadFluxMoE", model_name="emoji-flux-moe.safetensors", weight_dtype="default"),
        "stock loader": node("UNETLoader", unet_name="emoji-flux-moe.safetensors", weight_dtype="default"),
        "teacher": node("UNETLoader", unet_name="teacher.safetensors", weight_dtype="default"),
        "one": node("D2MTopK", model=["moe", 0], top_k=1, gate="as in the file"),
        "all": node("D2MTopK", model=["moe", 0], top_k=12, gate="as in the file"),
        "one of stock": node("D2MTopK", model=["stock loader", 0], top_k=1, gate="as in the file"),
    }
    for name, model in {"k1": "one", "k12": "all", "k1 stock": "one of stock", "dense": "teacher"}.items():
        sampling(graph, name, [model, 0])
    images = paint(server, graph)
    assert np.array_equal(images["k1"], images["k1 stock"])
    assert np.abs(images["k12"] - images["dense"]).max() <= 1
    assert np.abs(images["k1"] - images["dense"]).max() > 10

    alone = {name: graph[name] for name in ("moe", "one")}
    sampling(alone, "alone", ["one", 0])
    assert np.array_equal(paint(server, alone)["alone"], images["k1"])


def test_interrupt_and_queue_again(server: ComfyServer) -> None:
    graph: ApiGraph = {"moe": node("UNETLoader", unet_name="emoji-flux-moe.safetensors", weight_dtype="default")}
    sampling(graph, "before", ["moe", 0], seed=3)
    before = paint(server, graph)["before"]

    endless = dict(graph)
    sampling(endless, "endless", ["moe", 0], seed=3, steps=10_000)
    del endless["before"]
    prompt = server.queue(endless)
    while "/10000 [" not in server.log.read_text():  # the sampler's progress bar
        time.sleep(0.05)
    server.post("/interrupt", {})
    entry = server.wait(prompt, seconds=120)
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]

    again = {"moe": graph["moe"]}
    sampling(again, "again", ["moe", 0], seed=3)
    again["again sampler"]["inputs"]["denoise"] = 0.999_999  # not from the cache
    assert np.abs(paint(server, again)["again"] - before).max() <= 1


@pytest.mark.parametrize("kind", WRONG)
def test_the_nodes_error_says_what_is_wrong(server: ComfyServer, kind: str) -> None:
    loader = node("D2MLoadFluxMoE", model_name=f"{kind}.safetensors", weight_dtype="default")
    graph: ApiGraph = {"moe": loader}
    sampling(graph, "image", ["moe", 0])
    with pytest.raises(ServerError, match="D2MLoadFluxMoE") as error:
        server.run(graph)
    assert WRONG[kind] in str(error.value)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            node("UNETLoader", unet_name="teacher.safetensors", weight_dtype="default"),
            "this MODEL is a Flux without experts",
        ),
        (node("UNETLoader", unet_name="emoji-flux-moe.safetensors", weight_dtype="default"), "Choose 0 to 12"),
    ],
)
def test_top_k_says_what_is_wrong(server: ComfyServer, loader: dict, message: str) -> None:
    graph: ApiGraph = {"loader": loader, "k": node("D2MTopK", model=["loader", 0], top_k=13, gate="sum")}
    sampling(graph, "image", ["k", 0])
    with pytest.raises(ServerError, match="D2MTopK") as error:
        server.run(graph)
    assert message in str(error.value)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_a_workflow_is_its_api_twin(server: ComfyServer, template: Template) -> None:
    workflow = json.loads((WORKFLOWS / f"{template.title}.json").read_text())
    twin = json.loads((WORKFLOWS / "api" / f"{template.name}.json").read_text())
    known = server.get("/object_info")
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for drawn in workflow["nodes"]:
        if drawn["type"] not in known:
            assert drawn["type"] in ("Note", "MarkdownNote")
            continue
        values, inputs = iter(drawn["widgets_values"]), {}
        for given in drawn["inputs"]:
            if "widget" in given:
                inputs[given["name"]] = next(values)
                takes = known[drawn["type"]]["input"]
                options = {**takes["required"], **takes.get("optional", {})}[given["name"]]
                if len(options) > 1 and options[1].get("control_after_generate"):
                    next(values)
            if given["link"] is not None:
                inputs[given["name"]] = links[given["link"]]
        assert next(values, None) is None
        graph[str(drawn["id"])] = node(drawn["type"], **inputs)
    assert graph == twin


def test_a_saved_flux_moe_is_offered_and_paints_the_same(server: ComfyServer) -> None:
    loader = node("D2MLoadFluxMoE", model_name="emoji-flux-moe.safetensors", weight_dtype="default")
    graph: ApiGraph = {"moe": loader, "k": node("D2MTopK", model=["moe", 0], top_k=4, gate="as in the file")}
    graph["save"] = node("D2MSaveFluxMoE", model=["k", 0], filename_prefix="diffusion_models/saved")
    sampling(graph, "image", ["k", 0])
    entry = server.wait(server.queue(graph))
    (name,) = entry["outputs"]["save"]["text"]
    assert name == "diffusion_models/saved_00001_.safetensors"
    (before,) = server.images({"outputs": {"image": entry["outputs"]["image"]}})
    again: ApiGraph = {"moe": node("D2MLoadFluxMoE", model_name="saved_00001_.safetensors", weight_dtype="default")}
    sampling(again, "again", ["moe", 0])
    assert np.array_equal(paint(server, again)["again"], np.asarray(before, np.int16))
    with TensorFile(server.base / "output" / name) as file:
        assert json.loads(file.metadata["prompt"])["save"]["class_type"] == "D2MSaveFluxMoE"


def test_the_save_node_says_what_is_wrong(server: ComfyServer) -> None:
    graph: ApiGraph = {"teacher": node("UNETLoader", unet_name="teacher.safetensors", weight_dtype="default")}
    graph["save"] = node("D2MSaveFluxMoE", model=["teacher", 0], filename_prefix="diffusion_models/never")
    with pytest.raises(ServerError, match="this MODEL is a Flux without experts"):
        server.run(graph)
    assert not list((server.base / "output").rglob("never*"))


def test_a_file_that_is_gone_by_the_time_it_is_loaded_is_said(server: ComfyServer) -> None:
    models = server.base / "models" / "diffusion_models"
    shutil.copyfile(models / "emoji-flux-moe.safetensors", models / "leaving.safetensors")
    listed = server.get("/object_info/D2MLoadFluxMoE")["D2MLoadFluxMoE"]["input"]["required"]["model_name"]
    assert "leaving.safetensors" in json.dumps(listed)
    (models / "leaving.safetensors").write_bytes((models / "leaving.safetensors").read_bytes()[:-1])
    graph: ApiGraph = {"moe": node("D2MLoadFluxMoE", model_name="leaving.safetensors", weight_dtype="default")}
    sampling(graph, "image", ["moe", 0])
    with pytest.raises(ServerError, match="truncated or damaged"):
        server.run(graph)
    (models / "leaving.safetensors").unlink()
    with pytest.raises(ServerError, match=r"leaving\.safetensors"):
        server.run(graph)

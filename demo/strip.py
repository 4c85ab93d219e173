"""Strips of images from one ComfyUI: a row for each model, a column for each prompt, from the same noise."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.models import TEACHER
from demo.server import ApiGraph, ComfyServer
from tools.host import ROOT

API_WORKFLOW = ROOT / "example_workflows" / "api" / "flux-moe-emoji.json"
SEED = 7
STRIP_PROMPTS = (
    "fox in the centre on blue",
    "panda in the left on green",
    "hot beverage in the right on purple",
    "rocket in the top on black",
    "umbrella in the bottom on yellow",
    "slice pizza in the centre on white",
    "flamingo in the right on blue",
    "cat in the left on orange",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Painter:
    """The model of a row: a file in ComfyUI's models/diffusion_models. `top_k` None: dense, through the stock loader."""

    label: str
    file: str
    top_k: int | None = None


TEACHER_ROW = Painter(label="teacher", file=TEACHER)


@dataclass(kw_only=True, slots=True)
class Row:
    """The images of a painter, and the median seconds from queueing a prompt to its picture."""

    images: list[Image.Image]
    seconds: float


def only_node(graph: ApiGraph, class_type: str) -> str:
    """Return the id of the graph's only node of a class."""
    (node_id,) = [node_id for node_id, node in graph.items() if node["class_type"] == class_type]
    return node_id


def workflow(prompt: str, painter: Painter, prefix: str) -> ApiGraph:
    """Return the example workflow with another prompt and model."""
    graph: ApiGraph = copy.deepcopy(json.loads(API_WORKFLOW.read_text()))
    graph[only_node(graph, "D2MEmojiPrompt")]["inputs"]["text"] = prompt
    graph[only_node(graph, "KSampler")]["inputs"]["seed"] = SEED
    graph[only_node(graph, "SaveImage")]["inputs"]["filename_prefix"] = prefix
    if painter.top_k is not None:
        graph[only_node(graph, "D2MTopK")]["inputs"]["top_k"] = painter.top_k
        graph[only_node(graph, "D2MLoadFluxMoE")]["inputs"]["model_name"] = painter.file
        return graph
    loader = {"class_type": "UNETLoader", "inputs": {"unet_name": painter.file, "weight_dtype": "default"}}
    del graph[only_node(graph, "D2MTopK")]
    graph[only_node(graph, "D2MLoadFluxMoE")] = loader
    graph[only_node(graph, "KSampler")]["inputs"]["model"] = [only_node(graph, "UNETLoader"), 0]
    return graph


def paint_rows(server: ComfyServer, painters: Sequence[Painter]) -> dict[str, Row]:
    """Paint every prompt with every painter; rows by the painters' labels."""
    rows: dict[str, Row] = {}
    for painter in painters:
        images, times = [], []
        for number, prompt in enumerate(STRIP_PROMPTS):
            start = time.monotonic()
            (image,) = server.run(workflow(prompt, painter, f"{painter.label.replace(' ', '-')}-{number}"))
            times.append(time.monotonic() - start)
            images.append(image)
        rows[painter.label] = Row(images=images, seconds=float(np.median(times)))
        print(f"  painted {len(STRIP_PROMPTS)} images: {painter.label}", flush=True)
    return rows


def save_images(rows: Mapping[str, Row], folder: Path) -> None:
    """Write every image of the rows as LABEL-NUMBER.png."""
    folder.mkdir(exist_ok=True)
    for label, row in rows.items():
        for number, picture in enumerate(row.images):
            picture.save(folder / f"{label.replace(' = ', '').replace(' ', '-')}-{number}.png")


def draw_strip(rows: Mapping[str, Row], file: Path) -> None:
    """Write all rows as one picture, with labels and prompts."""
    font = ImageFont.load_default(size=14)
    cell, top = 128, 40
    left = 20 + max(round(font.getlength(label)) for label in rows)
    strip = Image.new("RGB", (left + len(STRIP_PROMPTS) * (cell + 4), top + len(rows) * (cell + 4)), "white")
    draw = ImageDraw.Draw(strip)
    for column, prompt in enumerate(STRIP_PROMPTS):
        words = prompt.replace(" in the ", "\n")
        draw.multiline_text((left + column * (cell + 4) + 2, 3), words, fill="black", font=font, spacing=2)
    for number, (label, row) in enumerate(rows.items()):
        y = top + number * (cell + 4)
        draw.text((8, y + cell // 2 - 8), label, fill="black", font=font)
        for column, picture in enumerate(row.images):
            strip.paste(picture, (left + column * (cell + 4), y))
    strip.save(file)


def pixel_distance(images: Sequence[Image.Image], reference: Sequence[Image.Image]) -> float:
    """Return the root mean square difference of pixels in 0..1."""
    squares = [
        np.square(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean()
        for a, b in zip(images, reference, strict=True)
    ]
    return float(np.sqrt(np.mean(squares))) / 255

"""Strips of images from one ComfyUI: the same prompts and noise, a row for each model."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.server import ComfyServer, Graph
from tools.host import ROOT

API_WORKFLOW = ROOT / "example_workflows" / "api" / "flux-moe-emoji.json"
SEED = 7
PROMPTS = (
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
    """A row of a strip: a file in ComfyUI's models/diffusion_models. `top_k` None: dense, through the stock loader."""

    label: str
    file: str
    top_k: int | None = None


@dataclass(kw_only=True, slots=True)
class Row:
    """What a painter made, and the median seconds of an image: a whole queue-to-picture round trip."""

    images: list[Image.Image]
    seconds: float


def node_of(graph: Graph, class_type: str) -> str:
    """The id of the graph's only node of a class."""
    (found,) = [name for name, node in graph.items() if node["class_type"] == class_type]
    return found


def workflow(prompt: str, painter: Painter, prefix: str) -> Graph:
    """The example workflow with a prompt and a model."""
    graph: Graph = copy.deepcopy(json.loads(API_WORKFLOW.read_text()))
    graph[node_of(graph, "D2MEmojiPrompt")]["inputs"]["text"] = prompt
    graph[node_of(graph, "KSampler")]["inputs"]["seed"] = SEED
    graph[node_of(graph, "SaveImage")]["inputs"]["filename_prefix"] = prefix
    if painter.top_k is not None:
        graph[node_of(graph, "D2MTopK")]["inputs"]["top_k"] = painter.top_k
        graph[node_of(graph, "D2MLoadFluxMoE")]["inputs"]["model_name"] = painter.file
        return graph
    loader = {"class_type": "UNETLoader", "inputs": {"unet_name": painter.file, "weight_dtype": "default"}}
    del graph[node_of(graph, "D2MTopK")]
    graph[node_of(graph, "D2MLoadFluxMoE")] = loader
    graph[node_of(graph, "KSampler")]["inputs"]["model"] = [node_of(graph, "UNETLoader"), 0]
    return graph


def paint(server: ComfyServer, painters: Sequence[Painter]) -> dict[str, Row]:
    """Every prompt by every painter, by their labels."""
    rows: dict[str, Row] = {}
    for painter in painters:
        images, times = [], []
        for number, prompt in enumerate(PROMPTS):
            start = time.monotonic()
            (image,) = server.run(workflow(prompt, painter, f"{painter.label.replace(' ', '-')}-{number}"))
            times.append(time.monotonic() - start)
            images.append(image)
        rows[painter.label] = Row(images=images, seconds=float(np.median(times)))
        print(f"  painted {len(PROMPTS)} images: {painter.label}", flush=True)
    return rows


def draw_strip(rows: Mapping[str, Row], file: Path) -> None:
    """A row for each painter, a column for each prompt."""
    font = ImageFont.load_default(size=14)
    cell, top = 128, 40
    left = 20 + max(round(font.getlength(label)) for label in rows)
    strip = Image.new("RGB", (left + len(PROMPTS) * (cell + 4), top + len(rows) * (cell + 4)), "white")
    draw = ImageDraw.Draw(strip)
    for column, prompt in enumerate(PROMPTS):
        words = prompt.replace(" in the ", "\n")
        draw.multiline_text((left + column * (cell + 4) + 2, 3), words, fill="black", font=font, spacing=2)
    for number, (label, row) in enumerate(rows.items()):
        y = top + number * (cell + 4)
        draw.text((8, y + cell // 2 - 8), label, fill="black", font=font)
        for column, picture in enumerate(row.images):
            strip.paste(picture, (left + column * (cell + 4), y))
    strip.save(file)


def pixel_distance(images: Sequence[Image.Image], reference: Sequence[Image.Image]) -> float:
    """Root mean square difference of pixels in 0..1."""
    squares = [
        np.square(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean()
        for a, b in zip(images, reference, strict=True)
    ]
    return float(np.sqrt(np.mean(squares))) / 255

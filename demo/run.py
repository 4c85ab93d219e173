"""`make demo` and `make comfy`: convert the emoji FLUX and paint with it in a real ComfyUI.

Leaves in demo/out/: emoji-flux-moe.safetensors (the converted file), topk-strip.png (teacher and k = 0, 1, 2, 4, 12 for
several prompts from the same noise; the paper's Fig. 8), strip/ (its images) and report.json (the printed table).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d2m_model.checkpoint import check_file
from d2m_model.cost import DENSE, Conversion, Cost, Tokens, flux
from demo.dataset import IMAGE
from demo.prompt_encoder import TOKENS
from demo.server import ComfyServer, Graph, ServerError
from tools.host import ROOT

ASSETS = ROOT / "demo" / "assets"
OUT = ROOT / "demo" / "out"
TEACHER, CONVERTED, AUTOENCODER = (
    "emoji-flux.safetensors",
    "emoji-flux-moe.safetensors",
    "emoji-autoencoder.safetensors",
)
WORKFLOW = ROOT / "example_workflows" / "flux-moe-emoji.json"
API_WORKFLOW = ROOT / "example_workflows" / "api" / "flux-moe-emoji.json"
TOP_K = (0, 1, 2, 4, 12)
Images = dict[int | None, list[Image.Image]]  # by Top-K; None: the teacher
IMAGE_TOKENS = (IMAGE // 16) ** 2
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


def convert(base: Path) -> None:
    """Lay out ComfyUI's model folders and convert the teacher, by the same command that a user types."""
    models = base / "models"
    for folder in ("diffusion_models", "vae"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ASSETS / TEACHER, models / "diffusion_models" / TEACHER)
    shutil.copyfile(ASSETS / "autoencoder.safetensors", models / "vae" / AUTOENCODER)
    converted = OUT / CONVERTED
    command = [
        sys.executable,
        "-m",
        "d2m_train",
        "convert",
        "--teacher",
        str(ASSETS / TEACHER),
        "--out",
        str(converted),
    ]
    command += ["--preset", "L", "--data", "emoji"]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.copyfile(converted, models / "diffusion_models" / CONVERTED)


def node_of(graph: Graph, class_type: str) -> str:
    """The id of the graph's only node of a class."""
    (found,) = [name for name, node in graph.items() if node["class_type"] == class_type]
    return found


def workflow(prompt: str, top_k: int | None, prefix: str) -> Graph:
    """The example workflow with a prompt and a Top-K; None: the dense teacher through the stock Load Diffusion Model."""
    graph: Graph = copy.deepcopy(json.loads(API_WORKFLOW.read_text()))
    graph[node_of(graph, "D2MEmojiPrompt")]["inputs"]["text"] = prompt
    graph[node_of(graph, "KSampler")]["inputs"]["seed"] = SEED
    graph[node_of(graph, "SaveImage")]["inputs"]["filename_prefix"] = prefix
    if top_k is not None:
        graph[node_of(graph, "D2MTopK")]["inputs"]["top_k"] = top_k
        return graph
    loader = {"class_type": "UNETLoader", "inputs": {"unet_name": TEACHER, "weight_dtype": "default"}}
    del graph[node_of(graph, "D2MTopK")]
    graph[node_of(graph, "D2MLoadFluxMoE")] = loader
    graph[node_of(graph, "KSampler")]["inputs"]["model"] = [node_of(graph, "UNETLoader"), 0]
    return graph


def paint(server: ComfyServer) -> tuple[Images, dict[int | None, float]]:
    """Images of every prompt by teacher (None) and every Top-K, and the median seconds of an image."""
    images: Images = {}
    seconds: dict[int | None, float] = {}
    for top_k in (None, *TOP_K):
        name = "teacher" if top_k is None else f"k{top_k}"
        times = []
        images[top_k] = []
        for number, prompt in enumerate(PROMPTS):
            start = time.monotonic()
            (image,) = server.run(workflow(prompt, top_k, f"{name}-{number}"))
            times.append(time.monotonic() - start)
            images[top_k].append(image)
        seconds[top_k] = float(np.median(times))
        print(f"  painted {len(PROMPTS)} images: {name}", flush=True)
    return images, seconds


def draw_strip(images: Images, file: Path) -> None:
    """A row for each model, a column for each prompt."""
    font = ImageFont.load_default(size=14)
    cell, left, top = 128, 84, 40
    strip = Image.new("RGB", (left + len(PROMPTS) * (cell + 4), top + len(images) * (cell + 4)), "white")
    draw = ImageDraw.Draw(strip)
    for column, prompt in enumerate(PROMPTS):
        words = prompt.replace(" in the ", "\n")
        draw.multiline_text((left + column * (cell + 4) + 2, 3), words, fill="black", font=font, spacing=2)
    for row, (top_k, pictures) in enumerate(images.items()):
        y = top + row * (cell + 4)
        draw.text((8, y + cell // 2 - 8), "teacher" if top_k is None else f"k = {top_k}", fill="black", font=font)
        for column, picture in enumerate(pictures):
            strip.paste(picture, (left + column * (cell + 4), y))
    strip.save(file)


def costs() -> dict[int | None, Cost]:
    """Parameters and FLOPs of one model evaluation: of the teacher (None), and of the converted file at every Top-K."""
    config = check_file(OUT / CONVERTED)
    tokens = Tokens(image=IMAGE_TOKENS, text=TOKENS)
    found: dict[int | None, Cost] = {None: flux(config.dims, DENSE, tokens)}
    for top_k in TOP_K:
        conversion = Conversion.of(config, top_k)
        found[top_k] = flux(config.dims, conversion, tokens)
    return found


def pixel_distance(images: Sequence[Image.Image], reference: Sequence[Image.Image]) -> float:
    """Root mean square difference of pixels in 0..1."""
    squares = [
        np.square(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean()
        for a, b in zip(images, reference, strict=True)
    ]
    return float(np.sqrt(np.mean(squares))) / 255


def table(images: Images, seconds: dict[int | None, float]) -> list[dict[str, Any]]:
    """The rows of the report: what each model costs and how far its images are from the teacher's."""
    cost = costs()
    return [
        {
            "model": TEACHER if top_k is None else f"{CONVERTED}, k = {top_k}",
            "activated_params": round(cost[top_k].touched),
            "flops": round(cost[top_k].flops),
            "flops_ratio": round(cost[top_k].flops / cost[None].flops, 4),
            "seconds_per_image": round(seconds[top_k], 2),
            "rms_to_teacher": round(pixel_distance(images[top_k], images[None]), 4),
        }
        for top_k in images
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'model':38} {'activated':>10} {'GFLOPs':>8} {'of dense':>9} {'s/image':>8} {'RMS to teacher':>15}")
    for row in rows:
        print(
            f"{row['model']:38} {row['activated_params'] / 1e6:>8.2f} M {row['flops'] / 1e9:>8.3f} "
            f"{row['flops_ratio']:>9.3f} {row['seconds_per_image']:>8.2f} {row['rms_to_teacher']:>15.4f}"
        )
    print("seconds: a whole queue-to-picture round trip on this machine, 20 steps; see benchmarks/ for speed.")


def demo() -> None:
    base = OUT / "comfyui"
    convert(base)
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(base) as server:
        images, seconds = paint(server)
    (OUT / "strip").mkdir(exist_ok=True)
    for top_k, pictures in images.items():
        for number, picture in enumerate(pictures):
            picture.save(OUT / "strip" / f"{'teacher' if top_k is None else f'k{top_k}'}-{number}.png")
    draw_strip(images, OUT / "topk-strip.png")
    rows = table(images, seconds)
    (OUT / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)
    print(f"\nTop-K strip: {OUT / 'topk-strip.png'}\nTeacher: {ASSETS / TEACHER}\nConverted file: {OUT / CONVERTED}")


def serve(port: int) -> None:
    """Leave ComfyUI running with the example workflow among the user's workflows, until Ctrl-C."""
    base = OUT / "comfyui"
    convert(base)
    workflows = base / "user" / "default" / "workflows"
    workflows.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(WORKFLOW, workflows / WORKFLOW.name)
    with ComfyServer(base, port=port) as server:
        print(f"\nComfyUI is running: {server.address}")
        print(f"Open the workflow `{WORKFLOW.stem}` (Workflows, or press W). Ctrl-C stops the server.", flush=True)
        try:
            assert server.process is not None
            server.process.wait()
        except KeyboardInterrupt:
            print("Stopping.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running")
    parser.add_argument("--port", type=int, default=8188, help="of --serve (default 8188)")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        serve(arguments.port) if arguments.serve else demo()
    except (ServerError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

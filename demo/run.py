"""`make demo` and `make comfy`: convert the emoji FLUX, distil it, and paint with all of them in a real ComfyUI.

Leaves in demo/out/: emoji-flux-moe.safetensors (converted, not trained), topk-strip.png (teacher and k = 0, 1, 2, 4, 12
from the same noise; the paper's Fig. 8), distilled-strip.png (before and after distillation), strip/ (their images),
expert-map.png (which expert painted what; the paper's Fig. 7), distil/ (the runs of demo/distil.py and their files) and
report.json (the printed tables).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2m_model.checkpoint import check_file
from d2m_model.cost import DENSE, Conversion, Tokens, flux
from demo.dataset import IMAGE
from demo.distil import PRESETS, compare, distil, print_comparison
from demo.prompt_encoder import TOKENS
from demo.server import ComfyServer, ServerError
from demo.strip import Painter, Row, draw_strip, paint, pixel_distance
from tools.host import ROOT

ASSETS = ROOT / "demo" / "assets"
OUT = ROOT / "demo" / "out"
TEACHER, CONVERTED, AUTOENCODER = (
    "emoji-flux.safetensors",
    "emoji-flux-moe.safetensors",
    "emoji-autoencoder.safetensors",
)
LORA = "emoji-sepia-lora.safetensors"
WORKFLOWS = ROOT / "example_workflows"
EXPERT_MAP = WORKFLOWS / "api" / "flux-moe-expert-map.json"
TOP_K = (0, 1, 2, 4, 12)
DENSE_ROW = Painter(label="teacher", file=TEACHER)
IMAGE_TOKENS = (IMAGE // 16) ** 2


def lay_out(base: Path) -> None:
    """ComfyUI's model folders with the teacher, the autoencoder and the LoRA."""
    models = base / "models"
    for folder in ("diffusion_models", "vae", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ASSETS / TEACHER, models / "diffusion_models" / TEACHER)
    shutil.copyfile(ASSETS / "autoencoder.safetensors", models / "vae" / AUTOENCODER)
    shutil.copyfile(ASSETS / LORA, models / "loras" / LORA)


def convert(base: Path) -> None:
    """Convert the teacher by the same command that a user types, into ComfyUI's folder."""
    lay_out(base)
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
    subprocess.run([*command, "--preset", "L", "--data", "emoji"], cwd=ROOT, check=True)
    shutil.copyfile(converted, base / "models" / "diffusion_models" / CONVERTED)


def distil_presets(base: Path) -> tuple[list[Painter], list[dict[str, Any]]]:
    """Train what the demo trains: the rows of its strip, before and after each, and the comparisons."""
    painters, comparisons = [DENSE_ROW], []
    for preset in PRESETS:
        print(f"\nDistilling preset {preset} ...", flush=True)
        files = distil(preset, OUT / "distil")
        comparisons.append({"preset": preset, **compare(files, ASSETS / TEACHER, OUT / "distil" / f"{preset}-scores")})
        if preset == "L":  # what stage `convert` made is what the command makes
            for target in (OUT / CONVERTED, base / "models" / "diffusion_models" / CONVERTED):
                shutil.copyfile(files.before, target)
        for label, file in (("converted", files.before), ("distilled", files.after)):
            name = f"emoji-flux-moe-{preset}-{label}.safetensors"
            shutil.copyfile(file, base / "models" / "diffusion_models" / name)
            painters.append(Painter(label=f"{preset} {label}", file=name, top_k=2))
    return painters, comparisons


def table(rows: Mapping[str, Row], painters: list[Painter]) -> list[dict[str, Any]]:
    """The rows of the report: what each model costs and how far its images are from the teacher's."""
    config = check_file(OUT / CONVERTED)
    tokens = Tokens(image=IMAGE_TOKENS, text=TOKENS)
    dense = flux(config.dims, DENSE, tokens)
    reference = rows[DENSE_ROW.label].images
    found = []
    for painter in painters:
        cost = dense if painter.top_k is None else flux(config.dims, Conversion.of(config, painter.top_k), tokens)
        row = rows[painter.label]
        found.append(
            {
                "model": painter.file if painter.top_k is None else f"{painter.file}, k = {painter.top_k}",
                "activated_params": round(cost.touched),
                "flops": round(cost.flops),
                "flops_ratio": round(cost.flops / dense.flops, 4),
                "seconds_per_image": round(row.seconds, 2),
                "rms_to_teacher": round(pixel_distance(row.images, reference), 4),
            }
        )
    return found


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
    lay_out(base)
    top_k_rows = [DENSE_ROW, *(Painter(label=f"k = {k}", file=CONVERTED, top_k=k) for k in TOP_K)]
    distilled_rows, comparisons = distil_presets(base)
    print("\nStarting ComfyUI ...", flush=True)
    with ComfyServer(base) as server:
        rows = paint(server, [*top_k_rows, *distilled_rows[1:]])
        server.run(json.loads(EXPERT_MAP.read_text()))[-1].save(OUT / "expert-map.png")
    (OUT / "strip").mkdir(exist_ok=True)
    for label, row in rows.items():
        for number, picture in enumerate(row.images):
            picture.save(OUT / "strip" / f"{label.replace(' = ', '').replace(' ', '-')}-{number}.png")
    draw_strip({row.label: rows[row.label] for row in top_k_rows}, OUT / "topk-strip.png")
    draw_strip({row.label: rows[row.label] for row in distilled_rows}, OUT / "distilled-strip.png")
    report = {"top_k": table(rows, top_k_rows), "distilled": comparisons}
    (OUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(report["top_k"])
    print_comparison(comparisons)
    print(f"\nTop-K strip: {OUT / 'topk-strip.png'}\nBefore and after: {OUT / 'distilled-strip.png'}")
    print(f"Expert map: {OUT / 'expert-map.png'}; `make comfy` opens it, and the other example workflows")
    print(f"Teacher: {ASSETS / TEACHER}\nConverted file: {OUT / CONVERTED}\nDistilled files: {OUT / 'distil'}")


def serve(port: int) -> None:
    """Leave ComfyUI running with the example workflows among the user's workflows, until Ctrl-C."""
    base = OUT / "comfyui"
    convert(base)
    workflows = base / "user" / "default" / "workflows"
    workflows.mkdir(parents=True, exist_ok=True)
    for workflow in WORKFLOWS.glob("*.json"):
        shutil.copyfile(workflow, workflows / workflow.name)
    with ComfyServer(base, port=port) as server:
        print(f"\nComfyUI is running: {server.address}")
        print("Open a workflow, such as `flux-moe-emoji` (Workflows, or press W). Ctrl-C stops the server.", flush=True)
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

"""`make demo` and `make comfy`: convert the emoji FLUX, and paint with it in a real ComfyUI.

Leaves in demo/out/: emoji-flux-moe.safetensors (converted, not trained), expert-map.png (which expert painted which
patch; the paper's Fig. 7), topk-strip.png (teacher and k = 0, 1, 2, 4, 12 from the same noise; the paper's Fig. 8),
strip/ (its images) and report.json (the printed table). `make distil` trains the converted model: demo/distil.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from d2m_model.checkpoint import check_file
from d2m_model.cost import DENSE, Conversion, Tokens, flux
from demo.dataset import EMOJI_TEACHER, IMAGE
from demo.models import COMFYUI, CONVERTED, OUT, add_diffusion_model, convert_teacher
from demo.prompt_encoder import PROMPT_TOKENS
from demo.server import ComfyServer, ServerError
from demo.strip import TEACHER_ROW, Painter, Row, draw_strip, paint_rows, pixel_distance, save_images
from tools.host import ROOT

WORKFLOWS = ROOT / "example_workflows"
EXPERT_MAP = WORKFLOWS / "api" / "flux-moe-expert-map.json"
STRIP_TOP_K = (0, 1, 2, 4, 12)
IMAGE_TOKENS = (IMAGE // 16) ** 2


def make_demo() -> None:
    """Convert, paint the expert map and the strip, and print what each model costs."""
    begin = time.monotonic()
    painters = [TEACHER_ROW, *(Painter(label=f"k = {k}", file=CONVERTED, top_k=k) for k in STRIP_TOP_K)]
    print("Starting ComfyUI, and converting meanwhile ...", flush=True)
    with ComfyServer(COMFYUI, wait=False) as server:
        convert_teacher(OUT / CONVERTED)
        add_diffusion_model(COMFYUI, OUT / CONVERTED, CONVERTED)
        server.wait_until_up()
        server.run(json.loads(EXPERT_MAP.read_text()))[-1].save(OUT / "expert-map.png")
        print(f"First picture, after {time.monotonic() - begin:.0f} s: {OUT / 'expert-map.png'}", flush=True)
        rows = paint_rows(server, painters)
    save_images(rows, OUT / "strip")
    draw_strip(rows, OUT / "topk-strip.png")
    report = {"top_k": costs_and_distances(rows, painters)}
    (OUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print_costs(report["top_k"])
    print(f"\nTop-K strip: {OUT / 'topk-strip.png'}")
    print(f"Expert map: {OUT / 'expert-map.png'}; `make comfy` opens it, and the other example workflows")
    print(f"Teacher: {EMOJI_TEACHER}\nConverted file: {OUT / CONVERTED}; `make distil` trains it")


def costs_and_distances(rows: Mapping[str, Row], painters: list[Painter]) -> list[dict[str, Any]]:
    """Rows of the report: what each model costs, and how far its images are from the teacher's."""
    config = check_file(OUT / CONVERTED)
    tokens = Tokens(image=IMAGE_TOKENS, text=PROMPT_TOKENS)
    dense = flux(config.dims, DENSE, tokens)
    reference = rows[TEACHER_ROW.label].images
    report = []
    for painter in painters:
        cost = dense if painter.top_k is None else flux(config.dims, Conversion.of(config, painter.top_k), tokens)
        row = rows[painter.label]
        report.append(
            {
                "model": painter.file if painter.top_k is None else f"{painter.file}, k = {painter.top_k}",
                "activated_params": round(cost.touched),
                "flops": round(cost.flops),
                "flops_ratio": round(cost.flops / dense.flops, 4),
                "seconds_per_image": round(row.seconds, 2),
                "rms_to_teacher": round(pixel_distance(row.images, reference), 4),
            }
        )
    return report


def print_costs(report: list[dict[str, Any]]) -> None:
    print(f"\n{'model':38} {'activated':>10} {'GFLOPs':>8} {'of dense':>9} {'s/image':>8} {'RMS to teacher':>15}")
    for row in report:
        print(
            f"{row['model']:38} {row['activated_params'] / 1e6:>8.2f} M {row['flops'] / 1e9:>8.3f} "
            f"{row['flops_ratio']:>9.3f} {row['seconds_per_image']:>8.2f} {row['rms_to_teacher']:>15.4f}"
        )
    print("s/image: from queue to picture on this machine, 20 steps; benchmarks/ measures speed.")


def serve(port: int) -> None:
    """Leave ComfyUI running with the example workflows among the user's workflows, until Ctrl-C."""
    workflows = COMFYUI / "user" / "default" / "workflows"
    workflows.mkdir(parents=True, exist_ok=True)
    for workflow in WORKFLOWS.glob("*.json"):
        shutil.copyfile(workflow, workflows / workflow.name)
    with ComfyServer(COMFYUI, port=port) as server:
        print(f"\nComfyUI is running: {server.address}")
        print(
            "Open a workflow, such as `1 First picture` (Workflows, or press W). Ctrl-C stops the server.", flush=True
        )
        try:
            assert server.process is not None
            server.process.wait()
        except KeyboardInterrupt:
            print("Stopping.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running")
    parser.add_argument("--port", type=int, default=8188, help="port of --serve (default 8188)")
    arguments = parser.parse_args()
    try:
        serve(arguments.port) if arguments.serve else make_demo()
    except (ServerError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make distil`: train presets L and M of the emoji FLUX for a few minutes each, and paint before and after.

The runs are configs/emoji-L.yaml and configs/emoji-M.yaml with fewer steps. A run that was interrupted is continued, and
one that is finished is not repeated. Leaves in demo/out/: distil/ (the runs, their files, and report.json with the
printed table), distilled-strip.png (before and after) and strip/ (its images).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.dataset import EMOJI_TEACHER
from demo.models import COMFYUI, OUT, add_diffusion_model, run_trainer
from demo.server import ComfyServer, ServerError
from demo.strip import TEACHER_ROW, Painter, draw_strip, paint_rows, save_images

RUNS = OUT / "distil"
DURATION = "By an estimate this takes ten minutes or so on two cores without other work."
# Steps of each preset: as many as a few minutes allow.
SHORTENED = {
    "L": ("stage.experts.steps=200",),
    "M": ("stage.experts.steps=100", "stage.blocks.steps=150"),
}
EVERY = 10  # score one of ten of the 500 fixed prompts


@dataclass(kw_only=True, slots=True, frozen=True)
class Files:
    """The student of a run: as the conversion made it, and as the training left it."""

    before: Path
    after: Path


def train_preset(preset: str) -> Files:
    """Train a preset in RUNS/PRESET. Raises CalledProcessError if the run fails."""
    out = RUNS / preset
    # The runs share their encoded pictures, and leave out measurements on the way.
    options = ["eyes.samples=0", "eyes.validation_batches=1", "eyes.validate_every=1000"]
    options += [f"output_dir={out}", f"data.cache={RUNS / 'cache'}", "resume=latest"]
    run_trainer("distill", f"configs/emoji-{preset}.yaml", *SHORTENED[preset], *options)
    return Files(before=out / "convert" / "student.safetensors", after=out / f"emoji-flux-moe-{preset}.safetensors")


def compare(files: Files, out: Path) -> dict[str, Any]:
    """Score both files on the same prompts and noise: the report of `python -m d2m_train evaluate`."""
    options: list[str | Path] = ["--against", files.before, "--teacher", EMOJI_TEACHER, "--data", "emoji"]
    run_trainer("evaluate", files.after, *options, "--every", str(EVERY), "--out", out, quiet=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def print_comparison(reports: list[dict[str, Any]]) -> None:
    """Print the means before and after, and the 95 % interval of the difference over the prompts."""
    print(f"\nDistillation, {reports[0]['prompts']} prompts from the same noise:")
    print(f"{'preset':8} {'score':18} {'teacher':>8} {'converted':>10} {'distilled':>10} {'difference (95 %)':>26}")
    for report in reports:
        for score, after in report["scores"].items():
            before, change = report["against"]["scores"][score], report["against"]["difference"][score]
            teacher = report["teacher"]["scores"].get(score)
            shown = "" if teacher is None else f"{teacher['mean']:.3f}"
            interval = f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
            print(
                f"{report['preset']:8} {score:18} {shown:>8} {before['mean']:>10.3f} {after['mean']:>10.3f} {interval:>26}"
            )


def make_distillations() -> None:
    """Train, score and paint every preset of SHORTENED."""
    print(f"Distilling presets {' and '.join(SHORTENED)} of the emoji FLUX, scoring and painting them.")
    print(f"{DURATION} Ctrl-C stops it; `make distil` then continues where it was.", flush=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    painters, reports = [TEACHER_ROW], []
    for number, preset in enumerate(SHORTENED, 1):
        begin = time.monotonic()
        print(f"\nPreset {preset} ({number} of {len(SHORTENED)}): training ...", flush=True)
        files = train_preset(preset)
        print(f"Preset {preset}: scoring ...", flush=True)
        reports.append({"preset": preset, **compare(files, RUNS / f"{preset}-scores")})
        for label, file in (("converted", files.before), ("distilled", files.after)):
            name = f"emoji-flux-moe-{preset}-{label}.safetensors"
            add_diffusion_model(COMFYUI, file, name)
            painters.append(Painter(label=f"{preset} {label}", file=name, top_k=2))
        print(f"Preset {preset}: finished in {(time.monotonic() - begin) / 60:.0f} minutes", flush=True)
    print("\nPainting in ComfyUI ...", flush=True)
    with ComfyServer(COMFYUI) as server:
        rows = paint_rows(server, painters)
    save_images(rows, OUT / "strip")
    draw_strip(rows, OUT / "distilled-strip.png")
    (RUNS / "report.json").write_text(json.dumps(reports, indent=1) + "\n")
    print_comparison(reports)
    print(f"\nBefore and after: {OUT / 'distilled-strip.png'}\nDistilled files and logs: {RUNS}")


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        make_distillations()
    except (ServerError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; `make distil` continues here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

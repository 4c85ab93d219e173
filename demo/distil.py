"""The demo's distillations: configs/emoji-L.yaml and -M.yaml, shortened to minutes, and what they change.

By the commands that a user types; a run that was interrupted goes on, and one that is done is not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.host import ROOT

PRESETS = ("L", "M")
# Of the runs in configs/ so much as a few minutes allow.
SHORTENED = {
    "L": ("stage.experts.steps=200",),
    "M": ("stage.experts.steps=100", "stage.blocks.steps=150"),
}
EVERY = 10  # of the 500 prompts
# Threads that wait without spinning: a busy machine otherwise takes several times as long.
ENVIRONMENT = {**os.environ, "GOMP_SPINCOUNT": "0"}


@dataclass(kw_only=True, slots=True, frozen=True)
class Files:
    """Of one run: the student before training (what `convert` makes) and after it."""

    before: Path
    after: Path


def distil(preset: str, folder: Path) -> Files:
    """The run of a preset in `folder`/PRESET. Raises CalledProcessError if it fails."""
    out = folder / preset
    command = [sys.executable, "-m", "d2m_train", "distill", f"configs/emoji-{preset}.yaml", f"output_dir={out}"]
    # What is measured on the way is left out, and the two runs share their encoded pictures.
    command += [*SHORTENED[preset], "eyes.samples=0", "eyes.validation_batches=1", "eyes.validate_every=1000"]
    command += [f"data.cache={folder / 'cache'}", "resume=latest"]
    subprocess.run(command, cwd=ROOT, check=True, env=ENVIRONMENT)
    return Files(before=out / "convert" / "student.safetensors", after=out / f"emoji-flux-moe-{preset}.safetensors")


def compare(files: Files, teacher: Path, out: Path) -> dict[str, Any]:
    """The report of `python -m d2m_train evaluate`: both files on the same prompts and noise, and their difference."""
    command = [sys.executable, "-m", "d2m_train", "evaluate", str(files.after), "--against", str(files.before)]
    command += ["--teacher", str(teacher), "--data", "emoji", "--every", str(EVERY), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def print_comparison(reports: list[dict[str, Any]]) -> None:
    """Means before and after, and the 95 % interval of the difference, prompt by prompt."""
    print(f"\nDistillation, {reports[0]['prompts']} prompts at equal noise:")
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

"""What conversion without training keeps of the emoji FLUX, option by option, over three seeds.

    python -m benchmarks.training_free            experts (preset L)
    python -m benchmarks.training_free blocks     block groups (M, S, XS), DiffMoE's router, and the dense baselines

Each variant is converted by the command line, on a calibration that all variants of a seed share, and paints fixed
prompts from the teacher's noise. `distance` is |latents - teacher's| / |teacher's| over all of them; accuracies are the
demo's scorer's. Rows are written as they come, so an interrupted run goes on; benchmarks/results/training_free-cpu.json, and
training_free_blocks-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer
from demo import dataset, prompt_encoder
from demo.sample import sample
from demo.score import decode, score
from demo.train import fast_on_cpu

from . import record

TEACHER = dataset.ASSETS / "emoji-flux.safetensors"
TOP_K = 2
EVERY_K = (0, 1, 2, 3, 4, 6, 12)
DEFAULT = "default (preset L)"
SPLIT_ONLY = "--split-only"
PAPER = "paper's initialisation"
PAPER_OPTIONS = ("--experts", "random", "--router", "random", "--no-mean", "--no-refit")


@dataclass(frozen=True)
class Study:
    """variants  conversions by name, with their options
    unit      the variant whose distance is 1 in the table's ratio
    every_k   variants whose first seed paints at every Top-K
    """

    result: str
    variants: dict[str, tuple[str, ...]]
    unit: str
    every_k: frozenset[str] = field(default_factory=frozenset)


# What each option adds, one after the other; then the default without each of its parts.
EXPERTS = Study(
    result="training_free",
    variants={
        PAPER: PAPER_OPTIONS,
        "+ mean compensation": ("--experts", "random", "--router", "random", "--no-refit"),
        "+ ridge router": ("--experts", "random", "--no-refit"),
        "+ co-activation experts": ("--no-refit",),
        DEFAULT: (),
        "default, random experts": ("--experts", "random"),
        "default, random router": ("--router", "random"),
        "default, centroid router": ("--router", "centroid"),
        "default, without means": ("--no-mean",),
        "default, importance by weight norm": ("--importance", "weight-norm"),
        "default, modulations not compressed": ("--adaln-rank", "128"),
        SPLIT_ONLY: ("--split-only",),
    },
    unit=PAPER,
    every_k=frozenset({DEFAULT, SPLIT_ONLY}),
)
# Of each preset: how its blocks are chosen, and what a dense model of the blocks that run is.
BLOCKS = Study(
    result="training_free_blocks",
    variants={
        DEFAULT: (),
        "L, DiffMoE's capacity router": ("--router-kind", "capacity"),
        "L, MLP pruning": ("--baseline", "mlp_pruning"),
        **{
            f"{preset}{variant}": ("--preset", preset, *options)
            for preset in ("M", "S", "XS")
            for variant, options in {
                "": (),
                ", random block routers": ("--block-router", "random"),
                ", groups where blocks change least": ("--groups", "auto"),
                ", depth pruning": ("--baseline", "depth_pruning"),
            }.items()
        },
    },
    unit=DEFAULT,
)
STUDIES = {"experts": EXPERTS, "blocks": BLOCKS}


def convert(target: Path, calibration: Path, seed: int, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "d2m_train", "convert", "--teacher", str(TEACHER), "--out", str(target)]
    command += ["--data", "emoji", "--calibration", str(calibration), "--seed", str(seed), *options]
    subprocess.run(command, cwd=record.ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@torch.no_grad()
def paint(model: nn.Module, pictures: tuple[dataset.Picture, ...], seeds: range) -> Tensor:
    """Latents of every prompt, 20 steps, guidance 3.5."""
    encoder = prompt_encoder.load(dataset.ASSETS / "prompt-encoder.safetensors")
    with fast_on_cpu():
        return sample(model, encoder, [picture.caption() for picture in pictures], seeds=seeds)


def measure(latents: Tensor, teacher: Tensor, pictures: tuple[dataset.Picture, ...]) -> dict[str, float]:
    scores = score(decode(latents), pictures)["all"]
    return {"distance": round(float((latents - teacher).norm() / teacher.norm()), 4)} | {
        name: round(value, 4) for name, value in scores.items()
    }


def rows_to_measure(study: Study, seeds: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """(variant, seed, Top-K values)."""
    return [
        (variant, seed, EVERY_K if seed == 0 and variant in study.every_k else (TOP_K,))
        for seed in range(seeds)
        for variant in study.variants
    ]


def run(study: Study, results: Path, every: int, seeds: int) -> list[dict[str, Any]]:
    pictures, noise = dataset.prompts()[::every], range(0, len(dataset.prompts()), every)
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    dense = paint(load_transformer(TEACHER, torch.float32), pictures, noise)
    if not rows:
        rows.append({"variant": "teacher", "seed": 0, "top_k": None} | measure(dense, dense, pictures))
    with tempfile.TemporaryDirectory() as folder:
        for variant, seed, every_k in rows_to_measure(study, seeds):
            if (variant, seed) in done:
                continue
            # The importance is part of a calibration: without it, it is another one.
            variant_options = study.variants[variant]
            kind = "weight-norm" if "weight-norm" in variant_options else "taylor"
            target = Path(folder, "moe.safetensors")
            convert(target, Path(folder, f"{kind}-{seed}"), seed, variant_options)
            model = FluxMoETransformer2DModel.from_flux_moe(target, torch.float32)
            for top_k in every_k:
                if variant in study.every_k:
                    for moe in model.moe_ffns().values():
                        moe.top_k = top_k
                found = measure(paint(model, pictures, noise), dense, pictures)
                rows.append({"variant": variant, "seed": seed, "top_k": top_k} | found)
                print(json.dumps(rows[-1]), flush=True)
            partial = results.with_suffix(".part")
            partial.write_text(json.dumps(rows))
            os.replace(partial, results)
    return rows


def table(study: Study, rows: list[dict[str, Any]]) -> str:
    """Markdown: means over the seeds, with the standard deviation of the distance."""
    teacher = rows[0]
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows[1:]:
        grouped.setdefault((row["variant"], row["top_k"]), []).append(row)
    unit = mean(row["distance"] for row in grouped[study.unit, TOP_K])
    lines = [f"| | k | distance | of {study.unit} | object | of the teacher's |", "|---|---|---|---|---|---|"]
    for (variant, top_k), group in grouped.items():
        distances = [row["distance"] for row in group]
        spread = f" ± {stdev(distances):.3f}" if len(distances) > 1 else ""
        accuracy = mean(row["object"] for row in group)
        lines.append(
            f"| {variant} | {top_k} | {mean(distances):.3f}{spread} | {mean(distances) / unit:.2f} | {accuracy:.3f} "
            f"| {accuracy / teacher['object']:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES, default="experts")
    parser.add_argument("--every", type=int, default=10, help="paint every n-th of the 500 fixed prompts (default 10)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="rows as they come (default: benchmarks/out/RESULT.json)")
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    partial = options.rows or record.ROOT / "benchmarks" / "out" / f"{study.result}.json"
    partial.parent.mkdir(parents=True, exist_ok=True)
    rows = run(study, partial, options.every, options.seeds)
    print(table(study, rows))
    print(record.write(study.result, torch.device("cpu"), rows))
    partial.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())

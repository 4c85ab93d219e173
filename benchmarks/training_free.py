"""Quality of the emoji FLUX after conversion without training: one option at a time, over three seeds.

    python -m benchmarks.training_free            experts (preset L)
    python -m benchmarks.training_free blocks     block groups (M, S, XS), DiffMoE's router, and the dense baselines

Each variant is converted by the command line, with a calibration that all variants of a seed share, and paints fixed
prompts from the teacher's noise. `distance` is |latents - teacher's| / |teacher's| over all prompts; the accuracies come
from the demo's scorer. Every row is written at once, so that an interrupted run can be continued. Results:
benchmarks/results/training_free-cpu.json and training_free_blocks-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from d2m_model.atomic import atomic_file
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer
from demo import dataset
from demo.prompt_encoder import load_prompt_encoder
from demo.sample import sample_latents
from demo.score import decode, score_by_pairs
from demo.train import fast_on_cpu

from . import record

_TEACHER = dataset.EMOJI_TEACHER
_TOP_K = 2
_EVERY_K = (0, 1, 2, 3, 4, 6, 12)
_DEFAULT = "default (preset L)"
_SPLIT_ONLY = "--split-only"
_PAPER = "paper's initialisation"
_PAPER_OPTIONS = ("--experts", "random", "--router", "random", "--no-mean", "--no-refit")


@dataclass(frozen=True)
class Study:
    """A table of the benchmark.

    variants  conversions by name, with their options
    unit      the variant whose distance the table divides by
    every_k   variants that paint with every Top-K, for the first seed
    """

    result: str
    variants: dict[str, tuple[str, ...]]
    unit: str
    every_k: frozenset[str] = field(default_factory=frozenset)


# First the options are added one after the other; then the default loses one of its parts at a time.
_EXPERTS = Study(
    result="training_free",
    variants={
        _PAPER: _PAPER_OPTIONS,
        "+ mean compensation": ("--experts", "random", "--router", "random", "--no-refit"),
        "+ ridge router": ("--experts", "random", "--no-refit"),
        "+ co-activation experts": ("--no-refit",),
        _DEFAULT: (),
        "default, random experts": ("--experts", "random"),
        "default, random router": ("--router", "random"),
        "default, centroid router": ("--router", "centroid"),
        "default, without means": ("--no-mean",),
        "default, importance by weight norm": ("--importance", "weight-norm"),
        "default, modulations not compressed": ("--adaln-rank", "128"),
        _SPLIT_ONLY: ("--split-only",),
    },
    unit=_PAPER,
    every_k=frozenset({_DEFAULT, _SPLIT_ONLY}),
)
# For each preset: ways to choose its blocks, and a dense model of as many blocks as run.
_BLOCKS = Study(
    result="training_free_blocks",
    variants={
        _DEFAULT: (),
        "L, DiffMoE's capacity router": ("--router-kind", "capacity"),
        "L, MLP pruning": ("--baseline", "mlp_pruning"),
        **{
            f"{preset}{variant}": ("--preset", preset, *options)
            for preset in ("M", "S", "XS")
            for variant, options in {
                "": (),
                ", random block routers": ("--block-router", "random"),
                ", stand-ins": ("--stand-ins",),
                ", groups where blocks change least": ("--groups", "auto"),
                ", depth pruning": ("--baseline", "depth_pruning"),
            }.items()
        },
    },
    unit=_DEFAULT,
)
_STUDIES = {"experts": _EXPERTS, "blocks": _BLOCKS}


def convert_variant(target: Path, calibration: Path, seed: int, options: tuple[str, ...]) -> None:
    command = [
        sys.executable,
        "-m",
        "d2m_train",
        "convert",
        "--teacher",
        str(_TEACHER),
        "--out",
        str(target),
        "--overwrite",
    ]
    command += ["--data", "emoji", "--calibration", str(calibration), "--seed", str(seed), *options]
    subprocess.run(command, cwd=record.ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@torch.no_grad()
def paint_latents(model: nn.Module, pictures: tuple[dataset.Picture, ...], seeds: range) -> Tensor:
    """Paint every prompt with 20 steps and guidance 3.5, and return the latents."""
    encoder = load_prompt_encoder(dataset.ASSETS / "prompt-encoder.safetensors")
    with fast_on_cpu():
        return sample_latents(model, encoder, [picture.caption() for picture in pictures], seeds=seeds)


def compare_with_teacher(latents: Tensor, teacher: Tensor, pictures: tuple[dataset.Picture, ...]) -> dict[str, float]:
    """Return the distance to the teacher's latents and the scorer's accuracies."""
    scores = score_by_pairs(decode(latents), pictures)["all"]
    return {"distance": round(float((latents - teacher).norm() / teacher.norm()), 4)} | {
        name: round(value, 4) for name, value in scores.items()
    }


def rows_to_measure(study: Study, seeds: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """Return (variant, seed, Top-K values) of all measurements."""
    return [
        (variant, seed, _EVERY_K if seed == 0 and variant in study.every_k else (_TOP_K,))
        for seed in range(seeds)
        for variant in study.variants
    ]


def run(study: Study, results: Path, every: int, seeds: int) -> list[dict[str, Any]]:
    pictures, noise = dataset.prompts()[::every], range(0, len(dataset.prompts()), every)
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    dense = paint_latents(load_transformer(_TEACHER, torch.float32), pictures, noise)
    if not rows:
        rows.append({"variant": "teacher", "seed": 0, "top_k": None} | compare_with_teacher(dense, dense, pictures))
    with tempfile.TemporaryDirectory() as folder:
        for variant, seed, every_k in rows_to_measure(study, seeds):
            if (variant, seed) in done:
                continue
            # A calibration without importance cannot serve the variants that need it.
            variant_options = study.variants[variant]
            kind = "weight-norm" if "weight-norm" in variant_options else "taylor"
            target = Path(folder, "moe.safetensors")
            convert_variant(target, Path(folder, f"{kind}-{seed}"), seed, variant_options)
            model = FluxMoETransformer2DModel.from_flux_moe(target, torch.float32)
            for top_k in every_k:
                if variant in study.every_k:
                    for moe in model.moe_ffns().values():
                        moe.router_value = top_k
                measured = compare_with_teacher(paint_latents(model, pictures, noise), dense, pictures)
                rows.append({"variant": variant, "seed": seed, "top_k": top_k} | measured)
                print(json.dumps(rows[-1]), flush=True)
            with atomic_file(results) as part:
                part.write_text(json.dumps(rows))
    return rows


def markdown_table(study: Study, rows: list[dict[str, Any]]) -> str:
    """Return the means over the seeds as Markdown, with the standard deviation of the distance."""
    teacher = rows[0]
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows[1:]:
        grouped.setdefault((row["variant"], row["top_k"]), []).append(row)
    unit = mean(row["distance"] for row in grouped[study.unit, _TOP_K])
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
    parser.add_argument("study", nargs="?", choices=_STUDIES, default="experts")
    parser.add_argument(
        "--every", type=int, default=10, help="paint only every n-th of the 500 fixed prompts (default 10)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these variants alone, and print their table without writing a result"
    )
    parser.add_argument(
        "--rows", type=Path, help="file for an unfinished run's rows (default: benchmarks/out/RESULT.json)"
    )
    options = parser.parse_args(arguments)
    study = _STUDIES[options.study]
    if options.only:
        study = replace(study, variants={name: study.variants[name] for name in options.only}, unit=options.only[0])
    partial = options.rows or record.ROOT / "benchmarks" / "out" / f"{study.result}.json"
    partial.parent.mkdir(parents=True, exist_ok=True)
    rows = run(study, partial, options.every, options.seeds)
    print(markdown_table(study, rows))
    if options.only:
        return 0
    print(record.write_result(study.result, torch.device("cpu"), rows))
    partial.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())

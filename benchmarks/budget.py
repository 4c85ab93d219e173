"""A compute budget against one k for all: distance of the emoji FLUX's pictures to the dense model's, at equal cost.

    python -m benchmarks.budget

Converts preset L with a sensitivity table, and paints fixed prompts from the teacher's noise at the cost of each k in four
ways: with that k in every FFN and step; with the budget allotted by layer alone; by step alone; and by both, as the node and
set_budget do. Distances are |latents - teacher's| / |teacher's|, prompt by prompt, so that the differences to one k are
paired; intervals are 95 % over prompts. `together` is the distance of all latents in one. `share` is the mean cost of a
step, of the dense model's. Painted latents are kept in --folder, so that an interrupted run can be continued. Results:
benchmarks/results/budget-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2m_model.blocks import FFN
from d2m_model.budget import allot
from d2m_model.config import FluxMoEConfig
from d2m_model.cost import DENSE, Conversion, Tokens, flux
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer
from d2m_model.sensitivity import SENSITIVITY, Errors, Sensitivity
from d2m_train.evaluation.scores import distances, interval
from demo import dataset
from demo.prompt_encoder import load_prompt_encoder
from demo.sample import sample_latents, sigmas
from demo.train import fast_on_cpu

from . import record

_TEACHER = dataset.EMOJI_TEACHER
_STEPS = 20
_WAYS = ("one k", "by layer", "by step", "by layer and step")


def convert(file: Path) -> None:
    """Convert the emoji FLUX to preset L with a table, unless `file` is there."""
    if not file.exists():
        command = [sys.executable, "-m", "d2m_train", "convert", "--teacher", str(_TEACHER), "--out", str(file)]
        subprocess.run([*command, "--data", "emoji", "--sensitivity"], cwd=record.ROOT, check=True)


@torch.no_grad()
def paint(model: nn.Module, prompts: list[int], file: Path) -> Tensor:
    """Paint the prompts of these numbers, and return the latents; those in `file`, if it is there."""
    if not file.exists():
        encoder = load_prompt_encoder(dataset.ASSETS / "prompt-encoder.safetensors")
        captions = [dataset.prompts()[number].caption() for number in prompts]
        with fast_on_cpu():
            latents = sample_latents(model, encoder, captions, steps=_STEPS, seeds=prompts)
        save_file({"latents": latents.contiguous()}, file)
    return load_file(file)["latents"]


def without_steps(table: Sensitivity) -> Sensitivity:
    """Return the table with one bin for all noise levels, as the sum of its bins as an allotment weighs them."""
    widths = -np.diff(table.levels)

    def joined(errors: Errors) -> Errors:
        return (tuple((widths**2 @ np.array(errors)).tolist()),)

    return replace(
        table,
        levels=(table.levels[0], table.levels[-1]),
        ffns={name: joined(errors) for name, errors in table.ffns.items()},
        groups=tuple(joined(errors) for errors in table.groups),
    )


def without_layers(table: Sensitivity, config: FluxMoEConfig, tokens: Tokens) -> Sensitivity:
    """Return the table with each FFN's part, by the price of its experts, of the sum of all FFNs' errors."""
    lengths = {"img": tokens.image, "txt": tokens.text, "joint": tokens.joint}
    prices = {name: lengths[FFN.parse(name).stream] * config.ffns[name].width for name in table.ffns}
    total = np.sum([np.array(errors) for errors in table.ffns.values()], axis=0)
    parts = {name: total * price / sum(prices.values()) for name, price in prices.items()}
    return replace(table, ffns={name: tuple(map(tuple, part.tolist())) for name, part in parts.items()})


def dense_share(config: FluxMoEConfig, k: int, tokens: Tokens) -> float:
    """Return the cost of one k in every FFN, of the dense model's."""
    return flux(config.dims, Conversion.of(config, k), tokens).flops / flux(config.dims, DENSE, tokens).flops


def run(folder: Path, every: int, ks: list[int]) -> list[dict[str, Any]]:
    """Return a row for each k and way."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "L.safetensors"
    convert(file)
    prompts = list(range(0, len(dataset.prompts()), every))
    dense = paint(load_transformer(_TEACHER, torch.float32), prompts, folder / "teacher.safetensors")
    model = FluxMoETransformer2DModel.from_flux_moe(file, torch.float32)
    config, table, levels = model.flux_moe, model.flux_moe.sensitivity, sigmas(_STEPS).tolist()
    assert table is not None
    tokens = Tokens(image=table.image_tokens, text=table.text_tokens)
    tables = {
        "by layer": without_steps(table),
        "by step": without_layers(table, config, tokens),
        "by layer and step": table,
    }
    rows = []
    for k in ks:
        by_way: dict[str, np.ndarray] = {}
        for way in _WAYS:
            share = budget = dense_share(config, k, tokens)
            if way == "one k":
                model.set_top_k(k)
            else:
                provenance = config.provenance | {SENSITIVITY: tables[way].entry()}
                model.flux_moe = replace(config, provenance=provenance)
                model.set_budget(budget, levels)
                share = allot(config, tables[way], budget, tokens, levels).share
            latents = paint(model, prompts, folder / f"{way.replace(' ', '-')}-{k}.safetensors")
            found = distances(latents.flatten(1), dense.flatten(1))
            by_way[way] = found
            rows.append(
                {
                    "k": k,
                    "way": way,
                    "share": round(share, 4),
                    "prompts": len(prompts),
                    "together": round(float((latents - dense).norm() / dense.norm()), 4),
                    "distance": interval(found).as_dict(),
                    "less than with one k": interval(by_way["one k"] - found).as_dict(),
                }
            )
            if way == _WAYS[-1]:
                rows[-1]["less than by step"] = interval(by_way["by step"] - found).as_dict()
            print(json.dumps(rows[-1]), flush=True)
    return rows


def distance_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| cost of k | spent | share of the dense FLOPs | distance | less than with one k | all latents together |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[what]['mean']:.3f} ({row[what]['low']:.3f} … {row[what]['high']:.3f})"
            for what in ("distance", "less than with one k")
        ]
        lines.append(
            f"| {row['k']} | {row['way']} | {row['share']:.3f} | {cells[0]} | {cells[1]} | {row['together']:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=21, help="every n-th of the 500 fixed prompts (default 21: 24)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 3], metavar="K")
    parser.add_argument("--folder", type=Path, default=record.ROOT / "benchmarks" / "out" / "budget")
    options = parser.parse_args(arguments)
    rows = run(options.folder, options.every, options.top_k)
    print(distance_table(rows))
    print(record.write_result("budget", torch.device("cpu"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Show parameters and FLOPs of the presets L, M, S and XS on a FLUX.1, with the paper's Table 1 where it has them.

touched: all parameters used for one image. paper-counted: as the paper counts activated parameters
(one stream's MoE FFN for each double block; no timestep, guidance and pooled-text embedders, no final modulation).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from d2m_model.checkpoint import dims_of
from d2m_model.config import FluxDims, PresetName, adaln_rank_of, paper_layout, preset_groups, preset_layouts
from d2m_model.cost import DENSE, Conversion, Cost, Tokens, flux
from d2m_model.tensor_file import TensorFile

from .. import UserError
from ..teacher.known_flux import EMOJI_FLUX, FLUX_DEV

EMOJI_FILE = Path(__file__).parents[2] / "demo" / "assets" / "diffusion_models" / "emoji-flux.safetensors"
MEGAPIXEL = Tokens(image=4096, text=512)  # 1024 x 1024 pixels
_PAPER_TOP_K = 2


@dataclass(kw_only=True, slots=True, frozen=True)
class Printed:
    """A row of Table 1: activated parameters in billions, FLOPs in trillions."""

    activated: float
    flops: float


PRINTED = {
    "dense": Printed(activated=11.90, flops=66.00),
    "L": Printed(activated=5.15, flops=43.42),
    "M": Printed(activated=4.01, flops=35.70),
    "S": Printed(activated=3.19, flops=26.43),
    "XS": Printed(activated=2.64, flops=20.26),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = [*get_args(PresetName), "all"]
    parser.add_argument("--preset", choices=presets, default="all")
    parser.add_argument("--model", default="flux-dev", metavar="flux-dev|emoji|F", help="the dense FLUX.1; F is a file")
    parser.add_argument(
        "--top-k", type=int, default=_PAPER_TOP_K, metavar="K", help="experts per token (default: %(default)s)"
    )
    parser.add_argument("--image-tokens", type=int, metavar="T", help="image tokens; 1024 x 1024 pixels are 4,096")
    parser.add_argument("--text-tokens", type=int, metavar="T", help="text tokens, usually 512")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    dims, tokens = _model(args.model)
    tokens = Tokens(
        image=tokens.image if args.image_tokens is None else args.image_tokens,
        text=tokens.text if args.text_tokens is None else args.text_tokens,
    )
    presets = get_args(PresetName) if args.preset == "all" else (args.preset,)
    costs = preset_costs(dims, tokens, presets, args.top_k)
    if args.json:
        rows = [row | {"model": args.model} for row in cost_rows(costs, tokens, args.top_k)]
        print(json.dumps(rows if args.preset == "all" else rows[0], indent=2))
    else:
        printed = PRINTED if args.model == "flux-dev" and args.top_k == _PAPER_TOP_K and tokens == MEGAPIXEL else {}
        print(f"{args.model}: {tokens.image:,} image and {tokens.text:,} text tokens, top-{args.top_k} experts\n")
        print(cost_table(costs, printed))
    return 0


def preset_costs(dims: FluxDims, tokens: Tokens, presets: Sequence[PresetName], top_k: int) -> dict[str, Cost]:
    """Return the cost of `dense` and of every preset. Raises UserError for a top_k that no layer can run."""
    experts = paper_layout(dims.hidden_size).experts
    if not 0 <= top_k <= experts:
        raise UserError(f"--top-k is {top_k}; expected 0 to {experts}, the number of experts.")
    costs = {"dense": flux(dims, DENSE, tokens)}
    for preset in presets:
        conversion = Conversion(
            ffns=preset_layouts(dims),
            groups=preset_groups(preset, dims),
            adaln_rank=adaln_rank_of(dims.hidden_size),
            experts_per_token=top_k,
        )
        costs[preset] = flux(dims, conversion, tokens)
    return costs


def cost_rows(costs: dict[str, Cost], tokens: Tokens, top_k: int) -> list[dict[str, Any]]:
    """Return a row for each preset, for JSON."""
    return [
        {
            "preset": preset,
            "top_k": top_k,
            "image_tokens": tokens.image,
            "text_tokens": tokens.text,
            "total_params": round(cost.total),
            "touched_params": round(cost.touched),
            "paper_params": round(cost.paper),
            "flops": round(cost.flops),
            "flops_ratio": cost.flops / costs["dense"].flops,
        }
        for preset, cost in costs.items()
        if preset != "dense"
    ]


def cost_table(costs: dict[str, Cost], printed: dict[str, Printed]) -> str:
    """Format costs for a terminal, with the paper's figures in separate columns if there are any."""
    dense = costs["dense"]
    size, size_unit = (1e9, "B") if dense.total >= 1e9 else (1e6, "M")
    work, work_unit = (1e12, "TFLOP") if dense.flops >= 1e12 else (1e9, "GFLOP")
    rows = [["", f"total {size_unit}", f"touched {size_unit}", f"paper-counted {size_unit}", work_unit, "of dense"]]
    if printed:
        rows[0] += ["paper: activated B", "of dense"]
    for name, cost in costs.items():
        row = [name, *(f"{count / size:.2f}" for count in (cost.total, cost.touched, cost.paper))]
        row += [f"{cost.flops / work:.2f}", f"{cost.flops / dense.flops:.3f}"]
        if printed:
            row += [f"{printed[name].activated:.2f}", f"{printed[name].flops / printed['dense'].flops:.3f}"]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _model(name: str) -> tuple[FluxDims, Tokens]:
    """Return dimensions and usual tokens of `flux-dev`, `emoji`, or a file."""
    if name == "flux-dev":
        return FLUX_DEV, MEGAPIXEL
    if name == "emoji":
        return (_read_dims(EMOJI_FILE) if EMOJI_FILE.exists() else EMOJI_FLUX), Tokens(image=64, text=12)
    return _read_dims(Path(name)), MEGAPIXEL


def _read_dims(path: Path) -> FluxDims:
    with TensorFile(path) as file:
        return dims_of(file.shapes)

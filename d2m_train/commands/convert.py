"""Make a FLUX-MoE of a dense FLUX.1, without training.

Every FFN of the preset becomes one shared expert (its most important neurons) and twelve routed ones. With --data the
teacher itself is asked: which neurons matter (Eq. 6), which fire together, what an expert that is not chosen would have
said, and what the modulations read. Without it, everything comes from the weights.

With --split-only the weights stay the teacher's, reordered: the file opens as the teacher in any FLUX loader.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from d2m_model.config import PREDICTOR_WIDTH, PresetName, Selection
from d2m_model.conversion.block_routers import BlockRouterInit
from d2m_model.conversion.ffn import Experts, Recipe
from d2m_model.conversion.router_init import RouterInit

from .. import UserError
from ..conversion.run import convert
from ..conversion.settings import Baseline, ConversionSettings, FFNKind, Importance, TokenRouter
from ..data import open_data
from ..data.latents import FILE_FORMAT

TOP_K = 2  # the paper's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        type=Path,
        required=True,
        metavar="F",
        help="a dense FLUX.1: a .safetensors in BFL's or diffusers' keys, an index of shards, or a diffusers folder",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="G", help="the FLUX-MoE file to write")
    parser.add_argument(
        "--preset",
        choices=get_args(PresetName),
        default="L",
        help="L: experts in all blocks but the first (default); M: also groups of double blocks of which one runs; "
        "S and XS: of single blocks too",
    )
    parser.add_argument(
        "--groups",
        type=_groups,
        default="preset",
        metavar="preset|auto|LIST",
        help="blocks of which some run (Mixture of Blocks): the preset's groups; as many and as large ones, placed where "
        "blocks change least (needs --data); or a list such as double:4-6/1,single:10-14/1, first-last/active",
    )
    parser.add_argument(
        "--active", type=_positive, default=1, metavar="N", help="blocks of a group that run (default: 1)"
    )
    parser.add_argument(
        "--selection",
        choices=get_args(Selection),
        default="topk",
        help="of a group, the best blocks (Eq. 5, default) or the best window of neighbours (Eq. 4)",
    )
    parser.add_argument(
        "--router-kind",
        choices=get_args(TokenRouter),
        default="top_k",
        help="top_k: every token has --top-k experts (default); capacity: DiffMoE's, so many on average (needs --data)",
    )
    parser.add_argument(
        "--ffns",
        choices=get_args(FFNKind),
        default="moe",
        help="dense: FFNs stay the teacher's, and only the block groups are new (default: moe)",
    )
    parser.add_argument(
        "--baseline",
        choices=get_args(Baseline),
        default="none",
        help="what the paper compares with: FFNs pruned to what --top-k experts activate (Table 2), or depth to the "
        "blocks that run of the groups (Table 3; needs --data)",
    )
    parser.add_argument("--data", metavar="emoji|FILE", help=f"calibration data: the demo's dataset, or {FILE_FORMAT}")
    parser.add_argument(
        "--split-only", action="store_true", help="leave the weights the teacher's: no refit, no AdaLN compression"
    )

    method = parser.add_argument_group(
        "method (each default is what did best on the emoji FLUX; see docs/training-free.md)"
    )
    method.add_argument(
        "--importance",
        choices=get_args(Importance),
        help="which neurons the shared expert gets (default: taylor with --data, else weight-norm)",
    )
    method.add_argument(
        "--experts",
        choices=get_args(Experts),
        help="how the others become experts: neurons that fire together, dealt by importance, or at random as in the "
        "paper (default: coactivation with --data, else dealt)",
    )
    method.add_argument(
        "--router",
        choices=get_args(RouterInit),
        help="how routers begin: regression of the experts' outputs, mean W1 row, or at random as in the paper "
        "(default: ridge with --data, else centroid)",
    )
    method.add_argument(
        "--block-router",
        choices=get_args(BlockRouterInit),
        help="how routers of block groups begin: regression of the blocks' changes, or at random as in the paper "
        "(default: ridge with --data, else random)",
    )
    method.add_argument(
        "--mean",
        action=argparse.BooleanOptionalAction,
        help="experts that are not chosen are replaced by their mean output (default: with --data)",
    )
    method.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        help="refit the shared expert's W2 to what is missing at --top-k; other Top-K then fit less well "
        "(default: with --data, unless --split-only)",
    )
    method.add_argument(
        "--adaln-rank", type=_positive, metavar="N", help="rank of the AdaLN compression (default: hidden size / 12)"
    )
    method.add_argument(
        "--predictor-width",
        type=_positive,
        default=PREDICTOR_WIDTH,
        metavar="N",
        help=f"of a capacity router (default: {PREDICTOR_WIDTH})",
    )
    method.add_argument("--top-k", type=_positive, default=TOP_K, help="experts a token (default: 2)")
    method.add_argument("--seed", type=int, default=0)

    calibration = parser.add_argument_group("calibration")
    calibration.add_argument("--batches", type=_positive, default=32, help="default: 32")
    calibration.add_argument("--batch-size", type=_positive, default=8, help="samples in a batch (default: 8)")
    calibration.add_argument("--tokens", type=_positive, default=8192, help="kept of every FFN, in all (default: 8192)")
    calibration.add_argument("--device", help="default: cuda if there is one, else cpu")
    calibration.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="keep the calibration here, and use what is there; else it lies beside --out until that is written",
    )
    calibration.add_argument(
        "--report", type=Path, metavar="FILE", help="errors of every FFN and modulation, JSON (default: G.report.json)"
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _groups(text: str) -> str | tuple[str, ...]:
    return text if text in ("preset", "auto") else tuple(text.split(","))


def settings_of(args: argparse.Namespace) -> ConversionSettings:
    """The options with their defaults. Raises UserError for options that need data, or that --split-only excludes."""
    data, split_only = args.data is not None, args.split_only
    if split_only and (args.refit or args.adaln_rank):
        wrong = "--refit" if args.refit else "--adaln-rank"
        raise UserError(f"{wrong} changes weights, which --split-only forbids; leave out one of them.")
    if split_only and args.baseline == "depth_pruning":
        raise UserError(
            "--baseline depth_pruning leaves blocks out, which --split-only forbids; leave out one of them."
        )
    importance: Importance = args.importance or ("taylor" if data else "weight-norm")
    recipe = Recipe(
        experts=args.experts or ("coactivation" if data else "dealt"),
        router=args.router or ("ridge" if data else "centroid"),
        mean=data if args.mean is None else args.mean,
        refit=(data and not split_only) if args.refit is None else args.refit,
        top_k=args.top_k,
        seed=args.seed,
    )
    needs = {
        "--experts coactivation": recipe.experts == "coactivation",
        "--router ridge": recipe.router == "ridge",
        "--mean": recipe.mean,
        "--refit": recipe.refit,
        f"--importance {importance}": importance != "weight-norm",
        "--block-router ridge": args.block_router == "ridge",
        "--groups auto": args.groups == "auto",
        "--router-kind capacity": args.router_kind == "capacity",
        "--baseline depth_pruning": args.baseline == "depth_pruning",
    }
    if not data and any(needs.values()):
        option = next(option for option, wanted in needs.items() if wanted)
        raise UserError(f"{option} needs --data emoji or --data FILE: it asks the teacher itself.")
    return ConversionSettings(
        teacher=args.teacher,
        out=args.out,
        preset=args.preset,
        groups=args.groups,
        active=args.active,
        selection=args.selection,
        block_router=args.block_router or ("ridge" if data else "random"),
        ffns=args.ffns,
        baseline=args.baseline,
        router=args.router_kind,
        predictor_width=args.predictor_width,
        recipe=recipe,
        importance=importance,
        adaln_rank=None if split_only else args.adaln_rank or "preset",
        batches=args.batches,
        batch_size=args.batch_size,
        tokens=args.tokens,
        device=args.device,
        folder=args.calibration,
        report_file=args.report,
    )


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    convert(settings, None if args.data is None else open_data(args.data))
    return 0

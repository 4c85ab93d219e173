"""Measure which FFNs and noise levels of a FLUX-MoE need experts, and write the file with this table.

A compute budget is spent by the table: the node FLUX-MoE Budget in ComfyUI, set_budget in diffusers. The teacher runs forward
and backward on noised samples, and its FFNs are compared with the file's at every k. Nothing else of the file changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from d2m_model.sensitivity import MAX_BINS
from d2m_model.tensor_file import CheckpointError

from .. import UserError
from ..conversion.sensitivity import SensitivitySettings, schedule_shift
from ..conversion.table_file import add_table
from ..data import open_data
from ..data.latents import LATENTS_FORMAT
from ..evaluation.open_model import is_flux_moe
from .output import add_out_arguments, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a FLUX-MoE with top-k routers")
    parser.add_argument("--teacher", type=Path, required=True, metavar="F", help="the dense FLUX.1 that it was made of")
    parser.add_argument(
        "--data", required=True, metavar="emoji|FILE", help=f"samples: the demo's dataset, or {LATENTS_FORMAT}"
    )
    add_out_arguments(
        parser, "the file to write; FILE itself, with --overwrite, is replaced when the new one is complete"
    )
    measuring = parser.add_argument_group("measurement")
    measuring.add_argument("--bins", type=int, default=3, metavar="N", help="ranges of noise levels (default: 3)")
    measuring.add_argument("--batches", type=int, default=4, metavar="N", help="batches for each range (default: 4)")
    measuring.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples of a batch (default: 8)")
    measuring.add_argument("--probes", type=int, default=4, metavar="N", help="backward passes a batch (default: 4)")
    measuring.add_argument(
        "--shift", type=float, metavar="MU", help="time shift of the ranges (default: FLUX's, by size; emoji: 1.15)"
    )
    measuring.add_argument("--seed", type=int, default=0)
    measuring.add_argument("--device", help="default: cuda if there is one, else cpu")


def run(args: argparse.Namespace) -> int:
    for name in ("bins", "batches", "batch_size", "probes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more.")
    if args.bins > MAX_BINS:
        raise UserError(f"--bins is {args.bins}; expected {MAX_BINS} at most.")
    check_out(args)
    if not args.file.is_file():
        raise CheckpointError(f"{args.file}: there is no such file.")
    if not is_flux_moe(args.file):
        raise UserError(f"{args.file} is a dense FLUX; sensitivity is that of a FLUX-MoE.")
    data = open_data(args.data)
    settings = SensitivitySettings(
        bins=args.bins,
        batches=args.batches,
        batch_size=args.batch_size,
        probes=args.probes,
        mu=schedule_shift(data) if args.shift is None else args.shift,
        seed=args.seed,
    )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    table = add_table(args.file, args.out, args.teacher, data, settings, device)
    print(f"{args.out}: written, with the errors of {len(table.ffns)} FFNs and {len(table.groups)} block groups.")
    return 0

"""Fill a run's cache with latents and text embeddings of all its data, so that training needs no encoders.

It can be interrupted and started again. Several processes share the work if each gets its number by --rank and --world
or, as from torchrun, by RANK and WORLD_SIZE: `torchrun --nproc-per-node 8 -m d2m_train cache RUN.yaml`.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch

from .. import UserError
from ..data import open_source
from ..data.pictures import PictureSource
from ..data.samples import describe_left_out
from ..progress import sample_progress
from ..run_file import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="fields of the run, by dotted name")
    parser.add_argument(
        "--rank", type=int, default=int(os.environ.get("RANK", 0)), help="number of this process, from 0"
    )
    parser.add_argument("--world", type=int, default=int(os.environ.get("WORLD_SIZE", 1)), help="number of processes")
    parser.add_argument("--device", help="device of the encoders (default: cuda if there is one, else cpu)")


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.rank < args.world:
        raise UserError(f"--rank {args.rank} of --world {args.world}: expected 0 … {args.world - 1}.")
    logging.basicConfig(format="%(message)s")
    config = load_run(args.file, args.overrides)
    source = open_source(config.data, config.output_dir, guidance=config.guidance, device=args.device or _device())
    with sample_progress("Cache", shown=args.rank == 0) as progress:
        source.prepare(args.rank, args.world, progress)
    if isinstance(source, PictureSource) and args.world == 1:
        for (width, height), count in source.buckets():
            print(f"{width:>5} × {height:<5} {count:>9,}")
        print(f"left out: {describe_left_out(source.left_out)}")
    return 0


def _device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

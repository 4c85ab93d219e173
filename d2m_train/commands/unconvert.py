"""Convert a FLUX-MoE back to a dense FLUX.1: one .safetensors in BFL keys, which every FLUX loader opens.

A --split-only file gives the teacher's weights bit for bit. A file that was refitted, compressed or trained gives the
nearest dense FLUX, which is not the teacher; the output says so.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from d2m_model.conversion.unconvert import unconvert_file, why_not_the_teacher

from ..progress import progress_bar
from .output import add_out_arguments, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a FLUX-MoE file")
    add_out_arguments(parser, "the dense file to write")


def run(args: argparse.Namespace) -> int:
    check_out(args)
    size = args.file.stat().st_size if args.file.is_file() else None
    with progress_bar(total=size, desc="Un-converting", unit="B", unit_scale=True) as bar:
        config = unconvert_file(args.file, args.out, bar.update)
    print(f"{args.out}: dense FLUX.1, {os.path.getsize(args.out):,} bytes.")
    if why := why_not_the_teacher(config):
        print(f"These are not the weights of {config.teacher.title}: {why}.")
    else:
        print(f"Its weights are those of {config.teacher.title} (sha256 {config.teacher.sha256}), bit for bit.")
    return 0

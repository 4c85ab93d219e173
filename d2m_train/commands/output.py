"""The option --out of commands that write a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import UserError


def add_out_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --out and --overwrite. `what` says what --out is."""
    parser.add_argument("--out", type=Path, required=True, metavar="G", help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")


def check_out(args: argparse.Namespace) -> None:
    """Raise UserError if there is something at --out already and --overwrite is not given."""
    out: Path = args.out
    exists = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if exists and not args.overwrite:
        raise UserError(f"{out}: exists already. Give --overwrite to replace it, or write elsewhere.")

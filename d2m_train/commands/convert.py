"""Convert a dense FLUX.1 to a FLUX-MoE without training.

Every FFN of the preset becomes one shared expert (its most important neurons) and twelve routed experts. With --data the
teacher is run to measure which neurons matter (Eq. 6), which fire together, what experts that are not chosen would have
added, and what the modulations read. Without it, everything is derived from the weights.

With --split-only the weights stay the teacher's, reordered: the file opens as the teacher in any FLUX loader.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from d2m_model.conversion.convert import refuse_same_file
from d2m_model.conversion.options import OPTIONS, method_arguments, needing_data, with_defaults
from d2m_model.teacher import open_teacher

from .. import UserError
from ..conversion.run import run_conversion
from ..conversion.sensitivity import SensitivitySettings, schedule_shift
from ..conversion.settings import ConversionSettings
from ..conversion.table_file import add_table
from ..data import open_data
from ..data.latents import LATENTS_FORMAT
from .output import add_out_arguments, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        type=Path,
        required=True,
        metavar="F",
        help="a dense FLUX.1: a .safetensors in BFL's or diffusers' keys, an index of shards, or a diffusers folder",
    )
    add_out_arguments(parser, "the FLUX-MoE file to write")
    _add_option(parser, "preset")
    _add_option(parser, "groups", type=_groups, metavar="preset|auto|LIST")
    _add_option(parser, "active", metavar="N")
    for name in ("selection", "router_kind", "ffns", "baseline"):
        _add_option(parser, name)
    parser.add_argument(
        "--data", metavar="emoji|FILE", help=f"calibration data: the demo's dataset, or {LATENTS_FORMAT}"
    )
    parser.add_argument(
        "--split-only",
        action="store_true",
        help="keep the teacher's weights, reordered: no refit, no AdaLN compression",
    )

    method = parser.add_argument_group(
        "method (each default is what did best on the emoji FLUX; see docs/training-free.md)"
    )
    for name in ("importance", "experts", "router", "block_router"):
        _add_option(method, name)
    _add_option(method, "stand_ins", action=argparse.BooleanOptionalAction)
    _add_option(method, "mean", action=argparse.BooleanOptionalAction)
    _add_option(method, "refit", action=argparse.BooleanOptionalAction)
    _add_option(method, "adaln_rank", metavar="N")
    _add_option(method, "predictor_width", metavar="N")
    _add_option(method, "top_k")
    _add_option(method, "seed", type=int)

    calibration = parser.add_argument_group("calibration")
    for name in ("batches", "batch_size", "tokens"):
        _add_option(calibration, name)
    calibration.add_argument("--device", help="default: cuda if there is one, else cpu")
    calibration.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="keep the calibration in this folder and reuse it; by default it is kept beside --out until that is written",
    )
    calibration.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="errors of every FFN and modulation, as JSON (default: G.report.json)",
    )
    calibration.add_argument(
        "--sensitivity",
        action="store_true",
        help="with --data: also measure where experts are needed, for a compute budget (see docs/budget.md)",
    )


def _add_option(parser: argparse._ActionsContainer, name: str, **keywords: Any) -> None:
    """Add an option of the table. Its value is None unless it is given."""
    option = OPTIONS[name]
    default = f"{option.default}"
    if option.depends_on_data:
        default = f"{option.default} with --data, else {option.without_data}"
    if isinstance(option.default, bool):
        default = "with --data" + (", unless --split-only" if name == "refit" else "")
    if option.choices:
        keywords["choices"] = option.choices
    if option.minimum is not None:
        keywords["type"] = _positive
    parser.add_argument(f"--{name.replace('_', '-')}", help=f"{option.help} (default: {default})", **keywords)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _groups(text: str) -> str | tuple[str, ...]:
    return text if text in ("preset", "auto") else tuple(text.split(","))


def settings_from(args: argparse.Namespace) -> ConversionSettings:
    """Fill in defaults. Raises UserError for options that need data, or that --split-only excludes."""
    calibrated, split_only = args.data is not None, args.split_only
    if split_only and (args.refit or args.adaln_rank):
        wrong = "--refit" if args.refit else "--adaln-rank"
        raise UserError(f"{wrong} changes weights, which --split-only forbids; leave out one of them.")
    if split_only and args.baseline == "depth_pruning":
        raise UserError(
            "--baseline depth_pruning leaves blocks out, which --split-only forbids; leave out one of them."
        )
    given = {name: getattr(args, name) for name in OPTIONS}
    if split_only:
        given |= {"adaln_rank": "none", "refit": False}
    values = with_defaults(given, calibrated=calibrated)
    if not calibrated and (needing := needing_data(values)):
        name, value = needing[0]
        option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        raise UserError(f"{option} needs --data emoji or --data FILE: it has to run the teacher.")
    return ConversionSettings(
        teacher=args.teacher,
        out=args.out,
        batches=values["batches"],
        batch_size=values["batch_size"],
        tokens=values["tokens"],
        device=args.device,
        folder=args.calibration,
        report_file=args.report,
        **method_arguments(values),
    )


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    with open_teacher(args.teacher) as teacher:
        refuse_same_file(teacher.files, args.out)
    check_out(args)
    if args.sensitivity and (args.data is None or settings.recipe.token_router.setting != "top_k"):
        raise UserError("--sensitivity needs --data, to run the teacher, and top-k routers.")
    if args.sensitivity and settings.baseline == "depth_pruning":
        raise UserError("--sensitivity compares blocks with the teacher's, which --baseline depth_pruning leaves out.")
    data = None if args.data is None else open_data(args.data)
    run_conversion(settings, data)
    if args.sensitivity:
        assert data is not None
        measured = SensitivitySettings(mu=schedule_shift(data), seed=settings.recipe.seed)
        add_table(args.out, args.out, args.teacher, data, measured, settings.torch_device)
        print(f"{args.out}: has a sensitivity table.")
    return 0

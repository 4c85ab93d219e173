"""Make a FLUX-MoE of a dense FLUX.1, without training.

Every FFN of the preset becomes one shared expert (its most important neurons) and twelve routed ones. With --data the
teacher itself is asked: which neurons matter (Eq. 6), which fire together, what an expert that is not chosen would have
said, and what the modulations read. Without it, everything comes from the weights.

With --split-only the weights stay the teacher's, reordered: the file opens as the teacher in any FLUX loader.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from d2m_model import VERSION
from d2m_model.config import (
    FluxMoEConfig,
    Gate,
    PresetName,
    adaln_rank_of,
    paper_layout,
    preset_groups,
    preset_layouts,
)
from d2m_model.conversion.adaln import FittedModulations, VecMoments
from d2m_model.conversion.convert import convert_file, describe_teacher, refuse_same_file
from d2m_model.conversion.ffn import Experts, FFNReport, Recipe, plan_with_data, plan_without_data
from d2m_model.conversion.importance import weight_norm_importance
from d2m_model.conversion.plan import FFNPlan, FFNWeights
from d2m_model.conversion.router_init import RouterInit
from d2m_model.keys import dense_shapes
from d2m_model.teacher import DenseTeacher, open_teacher
from d2m_model.tensor_file import CheckpointError

from . import UserError
from .calibrate import Calibration, CalibrationSettings, calibrate
from .data import open_data
from .data.latents import FILE_FORMAT

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

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
        "--preset", choices=get_args(PresetName), default="L", help="L: experts in all blocks but the first (default)"
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
        choices=("taylor", "weight-norm"),
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


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The options with their defaults. Raises UserError for options that need data, or that --split-only excludes."""
    data, split_only = args.data is not None, args.split_only
    if split_only and (args.refit or args.adaln_rank):
        wrong = "--refit" if args.refit else "--adaln-rank"
        raise UserError(f"{wrong} changes weights, which --split-only forbids; leave out one of them.")
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
        "--importance taylor": args.importance == "taylor",
    }
    if not data and any(needs.values()):
        option = next(option for option, wanted in needs.items() if wanted)
        raise UserError(f"{option} needs --data emoji or --data FILE: it asks the teacher itself.")
    return recipe


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    recipe = recipe_of(args)
    if args.preset != "L":
        raise UserError(
            f"Preset {args.preset} comes with the block groups, in a later version; this one converts to L."
        )
    with open_teacher(args.teacher) as teacher:
        refuse_same_file(teacher.files, args.out)
        _check_folder(args.out)
        for note in teacher.notes:
            print(note)
        config = _config(args, teacher, recipe)
        calibration = _calibration(args, teacher, config) if args.data else None
        modulations = _modulations(teacher, config, calibration)
        reports: dict[str, FFNReport] = {}
        with tqdm(total=teacher.size, desc="Converting", unit="B", unit_scale=True) as bar:
            convert_file(
                teacher,
                args.out,
                config,
                _planner(args, config, recipe, calibration, reports),
                modulations=modulations,
                router_bias=recipe.router == "ridge",
                expert_mean=recipe.mean,
                progress=bar.update,
            )
    if calibration is not None and args.calibration is None:
        shutil.rmtree(_folder(args))
    _report(args, config, recipe, reports, {} if modulations is None else modulations.errors)
    return 0


def _config(args: argparse.Namespace, teacher: DenseTeacher, recipe: Recipe) -> FluxMoEConfig:
    importance = args.importance or ("taylor" if args.data else "weight-norm")
    experts = paper_layout(teacher.dims.hidden_size).experts
    if recipe.top_k > experts:
        raise UserError(f"--top-k is {recipe.top_k}; expected 1 to {experts}, the number of experts.")
    rank = None if args.split_only else args.adaln_rank or adaln_rank_of(teacher.dims.hidden_size)
    if rank is not None and rank > teacher.dims.hidden_size:
        raise UserError(f"--adaln-rank is {rank}; expected 1 to {teacher.dims.hidden_size}, the hidden size.")
    how: dict[str, object] = {
        "tool": f"ComfyUI-Dense2MoE {VERSION}",
        "preset": args.preset,
        "importance": importance,
        **asdict(recipe),
    }
    if args.data:
        how["data"] = {"name": Path(args.data).name, "batches": args.batches, "batch_size": args.batch_size}
    return FluxMoEConfig(
        dims=teacher.dims,
        ffns=preset_layouts(teacher.dims),
        groups=preset_groups(args.preset, teacher.dims),
        gate=Gate(mode="sum", scale=1.0),
        top_k=recipe.top_k,
        adaln_rank=rank,
        split_only=rank is None and not recipe.refit,
        teacher=describe_teacher(teacher),
        provenance=how,
    )


def _check_folder(target: Path) -> None:
    """Before minutes of calibration rather than after."""
    folder = target.absolute().parent
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Create it, or write elsewhere.")


# Calibration


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _folder(args: argparse.Namespace) -> Path:
    folder: Path = args.calibration or args.out.with_name(f"{args.out.name}.calibration")
    return folder


def _calibration(args: argparse.Namespace, teacher: DenseTeacher, config: FluxMoEConfig) -> Calibration:
    from tqdm import tqdm

    device = _device(args)

    def load() -> FluxTransformer2DModel:
        from d2m_model.hosts.diffusers import load_transformer

        model = load_transformer(args.teacher, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
        if device.type != "cpu":
            model.enable_gradient_checkpointing()
        return model

    settings = CalibrationSettings(
        batches=args.batches,
        batch_size=args.batch_size,
        tokens=args.tokens,
        taylor=config.provenance["importance"] == "taylor",
        seed=args.seed,
    )
    files = [
        f"{file.absolute()}, {file.stat().st_size} bytes, modified {file.stat().st_mtime_ns}" for file in teacher.files
    ]
    with tqdm(total=args.batches, desc="Calibration", unit="batch") as bar:

        def progress(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

        return calibrate(
            load,
            teacher.dims,
            list(config.ffns),
            open_data(args.data),
            settings,
            _folder(args),
            "; ".join(files),
            progress,
        )


def _modulations(
    teacher: DenseTeacher, config: FluxMoEConfig, calibration: Calibration | None
) -> FittedModulations | None:
    if config.adaln_rank is None:
        return None
    names = [name for name in dense_shapes(config.dims) if name.endswith(("_mod.lin.weight", ".modulation.lin.weight"))]
    moments = VecMoments.unknown(config.dims.hidden_size) if calibration is None else calibration.moments()
    return FittedModulations(moments, map(teacher.tensor, names), config.adaln_rank)


def _planner(
    args: argparse.Namespace,
    config: FluxMoEConfig,
    recipe: Recipe,
    calibration: Calibration | None,
    reports: dict[str, FFNReport],
) -> Callable[[str, FFNWeights], FFNPlan]:
    device = _device(args)

    def importance(ffn: str, weights: FFNWeights) -> Tensor:
        if calibration is not None and config.provenance["importance"] == "taylor":
            return calibration.importance(ffn)
        return weight_norm_importance(weights.up_NH, weights.up_bias_N, weights.down_HN)

    def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
        importance_N = importance(ffn, weights)
        if calibration is None:
            return plan_without_data(ffn, weights, config.ffns[ffn], importance_N, recipe)
        inputs_TH = calibration.inputs(ffn).to(device)
        planned, reports[ffn] = plan_with_data(ffn, weights, config.ffns[ffn], importance_N, inputs_TH, recipe)
        return planned

    return plan


# Report


def _report(
    args: argparse.Namespace,
    config: FluxMoEConfig,
    recipe: Recipe,
    reports: dict[str, FFNReport],
    modulations: dict[str, float],
) -> None:
    layout = next(iter(config.ffns.values()))
    print(
        f"{args.out}: {len(config.ffns)} FFNs, each {layout.shared} shared neurons and {layout.experts} experts of "
        f"{layout.width}; top-{config.top_k}, {os.path.getsize(args.out):,} bytes."
    )
    if reports:
        errors = {name: report.to_dict() for name, report in reports.items()}
        averages = {kind: mean(of[kind] for of in errors.values()) for kind in next(iter(errors.values()))}
        print(f"Relative error of the FFNs' outputs at top-{recipe.top_k}, on tokens that no fit has seen, averaged:")
        print("  " + ", ".join(f"{kind} {value:.3f}" for kind, value in averages.items()))
        worst = max(errors, key=lambda name: errors[name]["converted"])
        print(f"  worst: {worst}, {errors[worst]['converted']:.3f}")
    if modulations:
        worst = max(modulations, key=modulations.__getitem__)
        print(
            f"Relative error of the modulations' outputs at rank {config.adaln_rank}: "
            f"{mean(modulations.values()):.3f}; worst: {worst}, {modulations[worst]:.3f}"
        )
    if reports or modulations:
        file = args.report or args.out.with_name(f"{args.out.name}.report.json")
        content = {
            "options": config.provenance,
            "ffns": {name: report.to_dict() for name, report in reports.items()},
            "modulations": modulations,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(f"All of them: {file}")

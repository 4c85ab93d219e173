"""Make a FLUX-MoE of a dense FLUX.1, without training.

Every FFN of the preset becomes one shared expert (its most important neurons) and twelve routed ones. The weights stay
the teacher's, reordered, so the file opens as the teacher in any FLUX loader. AdaLN compression arrives in a later
version: until then every conversion is --split-only, and that flag changes nothing.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from d2m_model import VERSION
from d2m_model.config import FluxDims, FluxMoEConfig, Gate, PresetName, preset_groups, preset_layouts
from d2m_model.conversion.convert import describe_teacher, open_teacher, refuse_same_file, split_file
from d2m_model.conversion.importance import weight_norms
from d2m_model.conversion.split import Dealing, RouterInit
from d2m_model.tensor_file import CheckpointError, TensorFile

from . import UserError
from .calibration import FILE_FORMAT, open_data, taylor_importance

TOP_K = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher", type=Path, required=True, metavar="F", help="a dense FLUX.1, one .safetensors in BFL keys"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="G", help="the FLUX-MoE file to write")
    parser.add_argument(
        "--preset",
        choices=get_args(PresetName),
        default="L",
        help="L: experts in all blocks but the first (default: L)",
    )
    parser.add_argument(
        "--importance",
        choices=("taylor", "weight-norm"),
        help="which neurons matter: taylor needs --data, weight-norm needs none (default: taylor if --data is given)",
    )
    parser.add_argument("--data", metavar="emoji|FILE", help=f"calibration data: the demo's dataset, or {FILE_FORMAT}")
    parser.add_argument(
        "--experts", choices=get_args(Dealing), default="dealt", help="how the routed neurons are dealt out"
    )
    parser.add_argument("--router", choices=get_args(RouterInit), default="centroid", help="how routers begin")
    parser.add_argument(
        "--split-only", action="store_true", help="only reorder the teacher's weights (implied for now)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=_positive, default=32, help="calibration batches (default: 32)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="samples in a calibration batch (default: 8)")
    parser.add_argument("--device", help="where calibration runs (default: cuda if there is one, else cpu)")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    method = args.importance or ("taylor" if args.data else "weight-norm")
    if method == "taylor" and not args.data:
        raise UserError("--importance taylor needs --data emoji or --data FILE; --importance weight-norm needs none.")
    if args.preset != "L":
        raise UserError(
            f"Preset {args.preset} comes with the block groups, in a later version; this one converts to L."
        )
    teacher_file, dims = open_teacher(args.teacher)
    refuse_same_file(args.teacher, args.out)
    _check_folder(args.out)
    if not args.split_only:
        print("--split-only is implied: AdaLN compression arrives in a later version.")
    layouts = preset_layouts(dims)

    with teacher_file, ThreadPoolExecutor(1) as pool:
        teacher = pool.submit(describe_teacher, teacher_file)  # reads the whole file once, beside the rest
        if method == "taylor":
            importance, how = _taylor(args)
        else:
            print("Importance by weight norm: data-free. Taylor importance (--data) keeps more of the teacher.")
            importance, how = _weight_norm(teacher_file, dims, list(layouts)), {"method": "weight-norm"}
        config = FluxMoEConfig(
            dims=dims,
            ffns=layouts,
            groups=preset_groups(args.preset, dims),
            gate=Gate(mode="sum", scale=1.0),
            top_k=TOP_K,
            adaln_rank=None,
            split_only=True,
            teacher=teacher.result(),
            provenance={
                "tool": f"ComfyUI-Dense2MoE {VERSION}",
                "preset": args.preset,
                "importance": how,
                "experts": args.experts,
                "router": args.router,
                "seed": args.seed,
            },
        )
        with tqdm(total=teacher_file.size, desc="Writing", unit="B", unit_scale=True) as bar:
            split_file(
                teacher_file,
                args.out,
                config,
                importance,
                dealing=args.experts,
                router=args.router,
                seed=args.seed,
                progress=bar.update,
            )
    layout = next(iter(layouts.values()))
    print(
        f"{args.out}: {len(layouts)} FFNs, each {layout.shared} shared neurons and {layout.experts} experts of {layout.width}; "
        f"top-{config.top_k}, {os.path.getsize(args.out):,} bytes."
    )
    return 0


def _check_folder(target: Path) -> None:
    """Before minutes of calibration rather than after."""
    folder = target.absolute().parent
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Create it, or write elsewhere.")


def _weight_norm(file: TensorFile, dims: FluxDims, ffns: list[str]) -> dict[str, Tensor]:
    from tqdm import tqdm

    with tqdm(total=len(ffns), desc="Importance", unit="FFN") as bar:
        return weight_norms(file.tensor, dims, ffns, bar.update)


def _taylor(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, object]]:
    from tqdm import tqdm

    from d2m_model.hosts.diffusers import load_transformer

    data = open_data(args.data)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_transformer(args.teacher, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    if device.type != "cpu":
        model.enable_gradient_checkpointing()
    losses: list[float] = []
    with tqdm(total=args.batches, desc="Calibration", unit="batch") as bar:

        def progress(loss: float) -> None:
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

        importance = taylor_importance(
            model, data, batches=args.batches, batch_size=args.batch_size, seed=args.seed, progress=progress
        )
    how = {"method": "taylor", "data": data.name, "batches": args.batches, "batch_size": args.batch_size}
    return importance, how | {"loss": round(sum(losses) / len(losses), 4)}

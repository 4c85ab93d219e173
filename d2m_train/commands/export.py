"""Write a FLUX-MoE file in another precision, or as a folder that diffusers' from_pretrained reads.

Weights are cast. Routers, means, thresholds and neuron orders keep their types, so that the same experts are chosen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError

from d2m_model.atomic import atomic_folder
from d2m_model.checkpoint import CONFIG_KEY, check_opened
from d2m_model.conversion.convert import file_metadata, refuse_same_file
from d2m_model.keys import dense_shapes
from d2m_model.tensor_file import TensorFile
from d2m_model.tensor_writer import TensorWriter

from .. import UserError
from ..run_config import Dtype
from .output import add_out_arguments, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a FLUX-MoE, such as a stage's student.safetensors")
    add_out_arguments(parser, "the file to write, or the folder")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--diffusers", action="store_true", help="write a diffusers folder instead of a file")


def run(args: argparse.Namespace) -> int:
    dtype = getattr(torch, args.dtype)
    check_out(args)
    if args.diffusers:
        export_to_diffusers(args.file, args.out, dtype)
    else:
        export_file(args.file, args.out, dtype)
    print(f"{args.out}: written.")
    return 0


def export_file(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a FLUX-MoE file with weights in `dtype` from another, tensor by tensor and atomically."""
    refuse_same_file([source], target, "this is the file to export")
    with TensorFile(source) as file:
        config = check_opened(file)
        weights = set(dense_shapes(config.dims))  # the AdaLN compression's U keeps its dtype, as routers do
        specs = {name: (dtype if name in weights else file.dtypes[name], shape) for name, shape in file.shapes.items()}
        target.parent.mkdir(parents=True, exist_ok=True)
        # The header may have more than the configuration, for example a title given by its maker.
        metadata = file_metadata(config) | {k: v for k, v in file.metadata.items() if k != CONFIG_KEY}
        with TensorWriter(target, specs, metadata) as writer:
            for name in writer.names:
                writer.put(name, file.tensor(name).to(specs[name][0]))
                file.release(name)
            writer.finish(metadata)


def export_to_diffusers(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a folder for FluxMoETransformer2DModel.from_pretrained, which replaces a folder of that name.

    It takes its name when it is whole: a full disk leaves what was there.
    """
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

    if folder.is_file():
        raise UserError(f"{folder} is a file; --diffusers writes a folder.")
    model = FluxMoETransformer2DModel.from_flux_moe(source, dtype)
    try:
        with atomic_folder(folder) as part:
            model.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error}).") from None

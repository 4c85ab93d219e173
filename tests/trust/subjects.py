"""Sound files for the tests of trust: FLUX-MoEs, dense FLUX.1 and LoRAs, as small as the blocks' widths allow."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2m_model.config import BlockGroup
from d2m_model.keys import dense_shapes
from d2m_model.routers import CapacityRouter
from tests.toys import files, teachers

DIMS = replace(files.DIMS, double_blocks=1, single_blocks=2)
GROUPS = (BlockGroup(kind="single", first=0, blocks=2, active=1, selection="topk"),)
CAPACITY = CapacityRouter(capacity=3.0, width=8)
_RANK = 4


def dense() -> dict[str, Tensor]:
    return files.dense_flux(DIMS)


def moe(**options: object) -> dict[str, Tensor]:
    return files.split(dense(), DIMS, **({"dense_double_blocks": 0} | options))  # type: ignore[arg-type]


def compressed() -> dict[str, Tensor]:
    _, modulations = files.compressible(dense(), _RANK, DIMS)
    return moe(compressed=modulations, mean=True)


def linears(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the blocks' linear layers, without `.weight`."""
    shapes = dense_shapes(DIMS)
    weights = (name for name in tensors if "blocks." in name and len(shapes.get(name, ())) == 2)
    return [name.removesuffix(".weight") for name in weights]


def quantised(tensors: dict[str, Tensor], companion: str) -> dict[str, Tensor]:
    """Store the blocks' linear layers in float8 with a scale each, which is called `companion`."""
    stored = dict(tensors)
    for layer in linears(tensors):
        stored[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
        stored[f"{layer}.{companion}"] = torch.tensor(1.0)
    return stored


def described(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise with ComfyUI's tensors comfy_quant."""
    about = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return quantised(tensors, "weight_scale") | {f"{layer}.comfy_quant": about for layer in linears(tensors)}


def lora(name_of: Callable[[str], str], down: str, up: str, alpha: str | None = None) -> dict[str, Tensor]:
    """Return a LoRA on every linear layer of the blocks."""
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for layer, (rows, columns) in ((name, dense_shapes(DIMS)[f"{name}.weight"]) for name in linears(dense())):
        tensors[f"{name_of(layer)}.{down}"] = torch.randn(_RANK, columns, generator=generator) * columns**-0.5
        tensors[f"{name_of(layer)}.{up}"] = torch.randn(rows, _RANK, generator=generator) * 0.1
        if alpha is not None:
            tensors[f"{name_of(layer)}.{alpha}"] = torch.tensor(float(_RANK))
    return tensors


def write_models(folder: Path) -> dict[str, Path]:
    """Write sound models of every form. Return them by form."""
    layers = {layer: {"format": "float8_e4m3fn"} for layer in linears(dense())}
    marker = {"scaled_fp8": torch.empty(2).to(torch.float8_e4m3fn)}
    models = {
        "FLUX-MoE": moe(),
        "with means and compressed modulations": compressed(),
        "with block groups and capacity routers": moe(groups=GROUPS, capacity=CAPACITY),
        "within a checkpoint": {f"model.diffusion_model.{name}": tensor for name, tensor in moe().items()},
        "quantised": described(moe()),
        "quantised, listed in the header": quantised(moe(), "weight_scale"),
        "quantised, formerly": quantised(moe(), "scale_weight") | marker,
        "dense": dense(),
        "dense, diffusers' names": teachers.diffusers_tensors(dense(), DIMS),
        "dense, scaled float8": described(dense()),
    }
    written = {}
    for form, tensors in models.items():
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if form.endswith("header") else None
        written[form] = folder / f"{form}.safetensors"
        save_file({name: _small(name, tensor) for name, tensor in tensors.items()}, written[form], metadata)
    return written


def _small(name: str, tensor: Tensor) -> Tensor:
    """Return a copy, in bfloat16 where that is allowed and smaller."""
    kept = any(part in name for part in (*files.KEPT, "scale"))
    return tensor.to(torch.bfloat16 if tensor.dtype == torch.float32 and not kept else None, copy=True).contiguous()


def write_loras(folder: Path) -> dict[str, Path]:
    """Write sound LoRAs in several namings. Return them by naming."""
    namings = {
        "kohya": lora(
            lambda layer: f"lora_unet_{layer.replace('.', '_')}", "lora_down.weight", "lora_up.weight", "alpha"
        ),
        "ComfyUI": lora(lambda layer: f"diffusion_model.{layer}", "lora_A.weight", "lora_B.weight"),
        "BFL": lora(lambda layer: layer, "lora_A.weight", "lora_B.weight"),
    }
    written = {}
    for naming, tensors in namings.items():
        written[naming] = folder / f"LoRA of {naming}.safetensors"
        save_file(tensors, written[naming])
    return written


def write_shards(folder: Path) -> Path:
    """Write a dense FLUX.1 in two shards. Return their index."""
    folder.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in dense().items()}
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index

"""Models and graphs for a running ComfyUI. One server serves all test files that ask for `server`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from d2m_model.config import BlockGroup, adaln_rank_of, preset_groups
from d2m_model.routers import CapacityRouter
from demo.server import ApiGraph
from tests.comfyui import grouped
from tests.toys import files
from tests.toys.wrong_files import WRONG, write_wrong

EMOJI = replace(files.DIMS, context_size=128, vector_size=128)  # widths of its prompt encoder's output
DEEP = replace(EMOJI, double_blocks=7, single_blocks=14)  # room for every preset
FEW = replace(DEEP, double_blocks=4, single_blocks=6)  # the least that preset XS takes

# A source of conditioning that needs no text encoder.
TINY_CONDITIONING = """
import torch

class TinyConditioning:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 128, generator=generator)
        return ([[torch.randn(1, 7, 128, generator=generator), {"pooled_output": pooled, "guidance": 3.5}]],)

NODE_CLASS_MAPPINGS = {"TinyConditioning": TinyConditioning}
"""


def write_base(base: Path, models: bool = True) -> None:
    """Write a base directory: TinyConditioning, and a FLUX-MoE or, with `models`, all of them."""
    emoji = files.dense_flux(EMOJI)
    files.save(files.split(emoji, EMOJI), base / "models" / "diffusion_models" / "emoji-flux-moe.safetensors")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "tiny_conditioning.py").write_text(TINY_CONDITIONING)
    if models:
        _write_models(base / "models" / "diffusion_models")


def _write_models(folder: Path) -> None:
    emoji = files.dense_flux(EMOJI)
    files.save(emoji, folder / "teacher.safetensors")
    for kind in WRONG:
        write_wrong(kind, emoji, files.split(emoji, EMOJI), folder / f"{kind}.safetensors")
    dims = replace(EMOJI, double_blocks=grouped.DIMS.double_blocks, single_blocks=grouped.DIMS.single_blocks)
    files.save(files.split(files.dense_flux(dims), dims, groups=grouped.GROUPS), folder / "grouped.safetensors")
    dense = files.dense_flux(DEEP)
    files.save(dense, folder / "dense.safetensors")
    # Presets have compressed modulations.
    _, compressed = files.compressible(dense, adaln_rank_of(DEEP.hidden_size), DEEP)
    for preset in ("L", "M", "XS"):
        split = files.split(dense, DEEP, compressed=compressed, groups=preset_groups(preset, DEEP))  # type: ignore[arg-type]
        files.save(split, folder / f"{preset}.safetensors")
    groups = (
        BlockGroup(kind="double", first=1, blocks=3, active=1, selection="topk"),
        BlockGroup(kind="single", first=2, blocks=5, active=2, selection="topk"),
    )
    files.save(files.split(dense, DEEP, groups=groups), folder / "groups.safetensors")
    capacity = files.split(dense, DEEP, capacity=CapacityRouter(capacity=3.0, width=16))
    files.save(capacity, folder / "capacity.safetensors")
    files.save(files.dense_flux(FEW), folder / "few-blocks.safetensors")
    (folder / "broken.safetensors").write_text("no model at all")


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def sampling(graph: ApiGraph, name: str, model: list, seed: int = 1, steps: int = 3, size: int = 128) -> None:
    """Add sampler, decoder and output to a graph: image `name`."""
    graph["conditioning"] = node("TinyConditioning", seed=1)
    graph["vae"] = node("VAELoader", vae_name="emoji-autoencoder.safetensors")
    graph["latent"] = node("EmptySD3LatentImage", width=size, height=size, batch_size=1)
    graph[f"{name} sampler"] = node(
        "KSampler", model=model, seed=seed, steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        positive=["conditioning", 0], negative=["conditioning", 0], latent_image=["latent", 0],
    )  # fmt: skip
    graph[f"{name} image"] = node("VAEDecode", samples=[f"{name} sampler", 0], vae=["vae", 0])
    graph[name] = node("SaveImage", images=[f"{name} image", 0], filename_prefix=name)

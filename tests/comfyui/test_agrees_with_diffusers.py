"""ComfyUI and diffusers compute the same velocity from the same FLUX-MoE file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.routers import CapacityRouter
from demo.in_process import Comfy
from tests.comfyui import grouped
from tests.toys import files
from tests.toys.compare import distance

pytest.importorskip("diffusers")

from einops import rearrange

from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
from d2m_train.__main__ import main

DEVICE = torch.device("cpu")
DIMS = grouped.DIMS
TIGHT = 1e-5


def comfyui_velocity(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """[B, 16, h, w], at guidance 3.5, from a MODEL."""
    model.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    denoised = grouped.evaluate(model, *batch)  # x - t * velocity
    model.unpatch_model(DEVICE)
    x, t, *_ = batch
    return (x - denoised) / t[:, None, None, None]


def diffusers_velocity(model: FluxMoETransformer2DModel, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the same as comfyui_velocity, computed by diffusers."""
    x, t, context, pooled = batch
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    with torch.no_grad():
        velocity = model(
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=t,
            guidance=torch.full_like(t, 3.5),
            img_ids=ids.flatten(0, 1),
            txt_ids=torch.zeros(context.shape[1], 3),
            return_dict=False,
        )[0]
    return rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


def convert(folder: Path, *options: str) -> Path:
    """A file converted from a small teacher by the command."""
    dense, moe = files.save(files.dense_flux(DIMS), folder / "dense.safetensors"), folder / "moe.safetensors"
    assert main(["convert", "--teacher", str(dense), "--out", str(moe), "--router", "random", *options]) == 0
    return moe


@pytest.mark.parametrize("options", [("--split-only",), ()], ids=["split only", "AdaLN compressed"])
def test_experts_agree(host: Comfy, tmp_path: Path, options: tuple[str, ...]) -> None:
    moe, batch = convert(tmp_path, *options), grouped.inputs(2)
    in_comfyui, in_diffusers = host.load(moe), FluxMoETransformer2DModel.from_flux_moe(moe)
    for top_k in (2, files.LAYOUT.experts):
        in_diffusers.set_top_k(top_k)
        found = comfyui_velocity(host.top_k(in_comfyui, top_k), batch)
        assert distance(found, diffusers_velocity(in_diffusers, batch)) <= TIGHT


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "M", "--split-only"),
        ("--preset", "S"),  # AdaLN compressed
        ("--preset", "S", "--selection", "window"),
        ("--preset", "S", "--ffns", "dense"),
    ],
    ids=" ".join,
)
def test_block_groups_agree(host: Comfy, tmp_path: Path, options: tuple[str, ...], watched: list) -> None:
    """Each sample of the batch with its own choice."""
    moe, batch = convert(tmp_path, *options), grouped.inputs(4)
    in_comfyui, in_diffusers = host.load(moe), FluxMoETransformer2DModel.from_flux_moe(moe)
    blocks = [router.active for router in in_diffusers.block_routers()]
    assert distance(comfyui_velocity(in_comfyui, batch), diffusers_velocity(in_diffusers, batch)) <= TIGHT
    for active in ([2] * len(blocks), [3] + [5] * (len(blocks) - 1), [0] * len(blocks)):
        for router, count in zip(in_diffusers.block_routers(), active, strict=True):
            router.active = count
        found = comfyui_velocity(grouped.active(host, in_comfyui, active), batch)
        assert distance(found, diffusers_velocity(in_diffusers, batch)) <= TIGHT
    assert any(0 < len(samples) < 4 for choice in watched for samples in choice)


def test_stand_ins_of_skipped_blocks_agree(host: Comfy, tmp_path: Path, watched: list) -> None:
    """Each sample of the batch with its own choice. With all blocks active stand-ins do nothing."""
    dense, batch = files.dense_flux(DIMS), grouped.inputs(4)
    tensors = files.split(dense, DIMS, groups=grouped.GROUPS, seed=grouped.SEED, stand_in_rank=8)
    moe = files.save(tensors, tmp_path / "moe.safetensors")
    plain = files.save(
        files.split(dense, DIMS, groups=grouped.GROUPS, seed=grouped.SEED), tmp_path / "plain.safetensors"
    )
    in_comfyui, without = host.load(moe), host.load(plain)
    in_diffusers = FluxMoETransformer2DModel.from_flux_moe(moe)
    for active in ([1, 2], [0, 0], [3, 5]):
        for router, count in zip(in_diffusers.block_routers(), active, strict=True):
            router.active = count
        found = comfyui_velocity(grouped.active(host, in_comfyui, active), batch)
        assert distance(found, diffusers_velocity(in_diffusers, batch)) <= TIGHT
        differs = distance(found, comfyui_velocity(grouped.active(host, without, active), batch))
        assert differs == 0 if active == [3, 5] else differs >= 1e-2
    assert any(0 < len(samples) < 4 for choice in watched for samples in choice)


@pytest.mark.parametrize("gate", ["sum", "normalised"])
def test_capacity_routers_agree(host: Comfy, tmp_path: Path, gate: Any) -> None:
    tensors = files.split(
        files.dense_flux(DIMS), DIMS, mean=True, groups=grouped.GROUPS, capacity=CapacityRouter(capacity=2.0, width=16),
        gate=files.Gate(mode=gate, scale=2.0),
    )  # fmt: skip
    moe, batch = files.save(tensors, tmp_path / "moe.safetensors"), grouped.inputs(3)
    in_comfyui, in_diffusers = host.load(moe), FluxMoETransformer2DModel.from_flux_moe(moe)
    seen = []
    for factor in (1.0, 0.0, 0.5, 3.0):
        in_diffusers.set_capacity_factor(factor)
        model = host.with_settings(in_comfyui, capacity=factor)
        seen.append(comfyui_velocity(model, batch))
        assert distance(seen[-1], diffusers_velocity(in_diffusers, batch)) <= TIGHT
    assert distance(seen[0], seen[3]) >= 1e-3

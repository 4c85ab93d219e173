"""ComfyUI and diffusers compute the same velocity from the same FLUX-MoE file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.comfyui import files
from tests.comfyui.inside import CONTEXT_TOKENS, Comfy, distance

pytest.importorskip("diffusers")

from einops import rearrange

from d2m_model.hosts.diffusers import experts_of, load_flux_moe
from d2m_train.__main__ import main

DEVICE = torch.device("cpu")


def diffusers_velocity(file: Path, top_k: int, x: Tensor, t: float, context: Tensor, pooled: Tensor) -> Tensor:
    """[1, 16, h, w], at guidance 3.5."""
    model, _ = load_flux_moe(file)
    for moe in experts_of(model):
        moe.top_k = top_k
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    with torch.no_grad():
        velocity = model(
            hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=torch.tensor([t]),
            guidance=torch.tensor([3.5]),
            img_ids=ids.flatten(0, 1),
            txt_ids=torch.zeros(CONTEXT_TOKENS, 3),
            return_dict=False,
        )[0]
    return rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


@pytest.mark.parametrize("options", [("--split-only",), ()], ids=["split only", "AdaLN compressed"])
@pytest.mark.parametrize("top_k", [2, files.LAYOUT.experts])
def test_comfyui_and_diffusers_agree(host: Comfy, tmp_path: Path, options: tuple[str, ...], top_k: int) -> None:
    dense, moe = files.save(files.dense_flux(), tmp_path / "dense.safetensors"), tmp_path / "moe.safetensors"
    assert main(["convert", "--teacher", str(dense), "--out", str(moe), "--router", "random", *options]) == 0
    model = host.top_k(host.load(moe), top_k)
    model.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    x, t = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)), 0.7
    denoised = host.evaluate(model)  # ComfyUI's model gives x - t * velocity
    model.unpatch_model(DEVICE)
    ((context, rest),) = host.conditioning(model, 1)
    velocity = diffusers_velocity(moe, top_k, x, t, context, rest["pooled_output"])
    assert distance((x - denoised) / t, velocity) <= 1e-5

"""Files that the loaders open, as which class, and errors about files that they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.toys import files
from tests.toys.compare import distance
from tests.toys.wrong_files import WRONG, write_wrong


@pytest.fixture
def models(host: Comfy) -> Path:
    """A folder that ComfyUI looks for diffusion models in."""
    folder = host.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_both_loaders_open_a_flux_moe_alike(host: Comfy, pair: Pair, models: Path) -> None:
    files.save(pair.split, models / "moe.safetensors")
    ours = host.run("D2MLoadFluxMoE", model_name="moe.safetensors", weight_dtype="default")
    stock = host.run("UNETLoader", unet_name="moe.safetensors", weight_dtype="default")
    assert type(ours.model).__name__ == type(stock.model).__name__ == "FluxMoEModel"
    assert torch.equal(host.sample(ours), host.sample(stock))
    reload, arguments = ours.cached_patcher_init  # by which ComfyUI makes a model that shares nothing with this one
    assert torch.equal(host.sample(reload(*arguments, disable_dynamic=True)), host.sample(ours))


def test_a_dense_flux_stays_comfyuis_own(pair: Pair) -> None:
    assert type(pair.teacher.model).__name__ == "Flux"
    assert type(pair.teacher.model.model_config).__name__ == "Flux"


@pytest.mark.parametrize(
    ("dims", "entry", "stock_entry"),
    [
        (files.DIMS, "FluxMoEDev", "Flux"),
        (replace(files.DIMS, guidance_embed=False), "FluxMoESchnell", "FluxSchnell"),
        (replace(files.DIMS, in_channels=384), "FluxMoEInpaint", "FluxInpaint"),
    ],
)
def test_every_kind_of_flux_keeps_its_sampling(
    host: Comfy, tmp_path: Path, dims: files.FluxDims, entry: str, stock_entry: str
) -> None:
    dense = files.dense_flux(dims)
    teacher = host.load(files.save(dense, tmp_path / "dense.safetensors")).model
    moe = host.load(files.save(files.split(dense, dims), tmp_path / "moe.safetensors")).model
    assert (type(moe.model_config).__name__, type(teacher.model_config).__name__) == (entry, stock_entry)
    assert moe.model_type == teacher.model_type
    sigma = torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(moe.model_sampling.timestep(sigma), teacher.model_sampling.timestep(sigma))
    assert torch.equal(moe.model_sampling.sigmas, teacher.model_sampling.sigmas)


def test_a_checkpoints_prefix_is_fine(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in pair.split.items()}
    opened = host.load(files.save(prefixed, tmp_path / "prefixed.safetensors"))
    assert torch.equal(host.sample(opened), host.sample(pair.moe))


@pytest.mark.parametrize(
    ("dtype", "held"),
    [("default", torch.bfloat16), ("fp8_e4m3fn", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_weights_of_any_dtype_paint_as_the_teachers_do(
    host: Comfy, pair: Pair, models: Path, dtype: str, held: torch.dtype
) -> None:
    files.save(pair.split, models / "moe.safetensors", torch.bfloat16)
    files.save(pair.dense, models / "dense.safetensors", torch.bfloat16)
    moe = host.run("D2MLoadFluxMoE", model_name="moe.safetensors", weight_dtype=dtype)
    teacher = host.run("UNETLoader", unet_name="dense.safetensors", weight_dtype=dtype)
    assert distance(host.sample(host.top_k(moe, files.LAYOUT.experts)), host.sample(teacher)) <= 1e-5
    block = moe.model.diffusion_model.single_blocks[0]
    assert block.linear1.weight.dtype == held
    assert torch.equal(block.router.weight, pair.split["single_blocks.0.router.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_in_half_precision_stays_with_the_teacher(host: Comfy, pair: Pair, dtype: torch.dtype) -> None:
    """Within one rounding of it; both are further from float32."""
    moe, teacher = host.top_k(pair.moe, files.LAYOUT.experts), pair.teacher.clone()
    moe.set_model_compute_dtype(dtype)
    teacher.set_model_compute_dtype(dtype)
    assert 0 < distance(host.sample(moe), host.sample(teacher)) <= torch.finfo(dtype).eps


# What is said


@pytest.mark.parametrize("kind", WRONG)
def test_the_loader_says_what_is_wrong(host: Comfy, pair: Pair, models: Path, kind: str) -> None:
    file = models / f"{kind}.safetensors"
    write_wrong(kind, pair.dense, pair.split, file)
    with pytest.raises(ValueError, match=re.escape(WRONG[kind])) as error:
        host.run("D2MLoadFluxMoE", model_name=file.name, weight_dtype="default")
    assert file.name in str(error.value)


@pytest.mark.parametrize(
    "kind", ["missing router", "missing weight", "wrong shape", "newer schema", "missing block router"]
)
def test_the_stock_loader_refuses_the_same(host: Comfy, pair: Pair, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "wrong.safetensors"
    write_wrong(kind, pair.dense, pair.split, file)
    with pytest.raises(ValueError, match=re.escape(WRONG[kind])):
        host.load(file)


def test_top_k_beyond_the_experts_is_refused(host: Comfy, pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"Top-K is 13, but this FLUX-MoE has 12 experts per FFN\. Choose 0 to 12\."):
        host.top_k(pair.moe, 13)


def test_top_k_of_a_dense_model_is_refused(host: Comfy, pair: Pair) -> None:
    with pytest.raises(
        ValueError, match="FLUX-MoE Top-K works on a FLUX-MoE, but this MODEL is a Flux without experts"
    ):
        host.top_k(pair.teacher, 2)

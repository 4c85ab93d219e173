"""A file with AdaLN compression in ComfyUI: where U and lin' stand for a modulation exactly, it is the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comfyui import files
from tests.comfyui.conftest import Pair
from tests.comfyui.inside import Comfy, distance

ALL = files.LAYOUT.experts
DEVICE = torch.device("cpu")
RANK = 24


@pytest.fixture(scope="module")
def compressed(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("compressed")
    dense, replacements = files.compressible(files.dense_flux(), RANK)
    split = files.split(dense, compressed=replacements)
    dense_file = files.save(dense, folder / "dense.safetensors")
    moe_file = files.save(split, folder / "moe.safetensors")
    return Pair(dense, split, dense_file, moe_file, host.load(dense_file), host.load(moe_file))


def test_it_samples_as_the_teacher(host: Comfy, compressed: Pair) -> None:
    expected = host.sample(compressed.teacher)
    assert distance(host.sample(host.top_k(compressed.moe, ALL)), expected) <= 1e-5
    assert distance(host.sample(host.top_k(compressed.moe, 2)), expected) >= 1e-2


def test_without_u_it_would_not(host: Comfy, compressed: Pair) -> None:
    """The control of the test above: the modulations count in the output."""
    adaln_in = compressed.moe.model.diffusion_model.adaln_in
    expected = host.sample(compressed.teacher)
    kept = adaln_in.weight.data.clone()
    adaln_in.weight.data.mul_(0.9)
    found = host.sample(host.top_k(compressed.moe, ALL))
    adaln_in.weight.data.copy_(kept)
    assert distance(found, expected) >= 1e-2


def test_u_is_held_once_and_every_name_is_the_files(compressed: Pair) -> None:
    flux = compressed.moe.model.diffusion_model
    names = {name.replace("_norm.weight", "_norm.scale") for name in flux.state_dict()}
    assert names == set(compressed.split)
    assert flux.adaln_in.weight.shape == (RANK, 128)
    for lin in (flux.double_blocks[0].img_mod.lin, flux.double_blocks[1].txt_mod.lin):  # 0: a dense block
        assert lin.weight.shape == (6 * 128, RANK)
    assert flux.single_blocks[2].modulation.lin.weight.shape == (3 * 128, RANK)
    assert flux.final_layer.adaLN_modulation[1].weight.shape == (2 * 128, 128)


def test_u_keeps_its_files_precision(host: Comfy, compressed: Pair, tmp_path: Path) -> None:
    """Of a bfloat16 file too, and whatever the other weights are cast to."""
    import comfy.sd

    file = files.save(compressed.split, tmp_path / "bf16.safetensors", torch.bfloat16)
    flux = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float8_e4m3fn}).model.diffusion_model
    assert flux.double_blocks[0].img_mod.lin.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(flux.adaln_in.weight, compressed.split["adaln_in.weight"])
    assert host.load(file).model.diffusion_model.adaln_in.weight.dtype == torch.float32


def test_low_vram_casts_u_and_the_modulations(host: Comfy, compressed: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management
    import comfy.ops

    comfy.model_management.unload_all_models()
    moe, teacher = host.top_k(compressed.moe, ALL), compressed.teacher
    teacher.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    expected = host.evaluate(teacher)
    teacher.unpatch_model(DEVICE)
    cast, returned = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight
    casts: list[Any] = []
    returns: list[Any] = []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, *a, **k: (casts.append(s), cast(s, *a, **k))[1])
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda s, *a: (returns.append(s), returned(s, *a))[1])
    moe.load(DEVICE, lowvram_model_memory=1)
    flux = moe.model.diffusion_model
    lin = flux.double_blocks[0].img_mod.lin
    assert lin.comfy_cast_weights
    found = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    assert distance(found, expected) <= 1e-5
    modulations = 2 * files.DIMS.double_blocks + files.DIMS.single_blocks
    assert casts.count(flux.adaln_in) == returns.count(flux.adaln_in) == modulations
    assert casts.count(lin) == returns.count(lin) == 1


def test_block_patches_see_the_vec_of_flux(host: Comfy, compressed: Pair) -> None:
    def vecs(model: Any) -> list[Tensor]:
        patched, seen = model.clone(), []

        def through(args: dict, extra: dict) -> dict:
            seen.append(args["vec"].clone())
            return extra["original_block"](args)

        for kind, depth in (("double_block", files.DIMS.double_blocks), ("single_block", files.DIMS.single_blocks)):
            for i in range(depth):
                patched.set_model_patch_replace(through, "dit", kind, i)
        host.sample(patched, steps=1)
        return seen

    found, expected = vecs(compressed.moe), vecs(compressed.teacher)
    assert len(found) == len(expected) == 5
    assert all(torch.equal(a, b) and a.shape == (1, 128) for a, b in zip(found, expected, strict=True))


def test_a_changed_vec_reaches_the_modulations(host: Comfy, compressed: Pair) -> None:
    """A pack that gives a block another vec finds it modulated by that one."""

    def halved(args: dict, extra: dict) -> dict:
        return extra["original_block"]({**args, "vec": args["vec"] * 0.5})

    models = [host.top_k(compressed.moe, ALL), compressed.teacher.clone()]
    for model in models:
        model.set_model_patch_replace(halved, "dit", "single_block", 1)
    found, expected = (host.sample(model, steps=1) for model in models)
    assert distance(found, expected) <= 1e-5
    assert distance(expected, host.sample(compressed.teacher, steps=1)) >= 1e-3


def test_compiled_blocks_have_no_graph_breaks(host: Comfy, compressed: Pair) -> None:
    flux = compressed.moe.model.diffusion_model
    x, vec = torch.randn(1, 40, 128), torch.randn(1, 128)
    common = {"vec": vec, "pe": flux.pe_embedder(torch.zeros(1, 40, 3)), "transformer_options": {}}
    single = flux.single_blocks[0]
    with torch.no_grad():
        compiled = torch.compile(single, fullgraph=True, backend="aot_eager")(x.clone(), **common)
        assert distance(compiled, single(x.clone(), **common)) <= 1e-6
        img, txt = x[:, :30], x[:, 30:]
        dense = flux.double_blocks[0]
        found = torch.compile(dense, fullgraph=True, backend="aot_eager")(img=img.clone(), txt=txt.clone(), **common)
        expected = dense(img=img.clone(), txt=txt.clone(), **common)
        assert distance(torch.cat(found, 1), torch.cat(expected, 1)) <= 1e-6
    torch.compiler.reset()


def test_half_precision_is_that_of_the_teacher(host: Comfy, compressed: Pair, tmp_path: Path) -> None:
    """The two steps of a modulation round about as much in bfloat16 as the dense one does."""
    exact = host.sample(compressed.teacher)
    errors = []
    for name, tensors in (("dense", compressed.dense), ("moe", compressed.split)):
        model = host.load(files.save(tensors, tmp_path / f"{name}.safetensors", torch.bfloat16))
        errors.append(distance(host.sample(host.top_k(model, ALL) if name == "moe" else model), exact))
    dense, moe = errors
    assert moe <= 1.5 * dense

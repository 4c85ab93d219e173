"""ComfyUI's own ways of running a model hold for a FLUX-MoE: low VRAM, torch.compile, patches of other packs."""

from __future__ import annotations

from dataclasses import replace
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


def test_low_vram_casts_weights_block_by_block(host: Comfy, pair: Pair) -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    moe = host.top_k(pair.moe, 2)
    moe.load(DEVICE, lowvram_model_memory=1)
    assert moe.model.model_lowvram
    assert moe.model.diffusion_model.single_blocks[0].linear1.comfy_cast_weights
    found = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    moe.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    assert not moe.model.model_lowvram
    expected = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    assert torch.equal(found, expected)


def test_compiled_blocks_have_no_graph_breaks(host: Comfy, pair: Pair) -> None:
    flux = pair.moe.model.diffusion_model
    x, vec = torch.randn(1, 40, 128), torch.randn(1, 128)
    common: dict[str, Any] = {"vec": vec, "pe": flux.pe_embedder(torch.zeros(1, 40, 3))}
    common["transformer_options"] = {"d2m": {"top_k": 3}}
    single, double = flux.single_blocks[0], flux.double_blocks[1]
    with torch.no_grad():
        compiled = torch.compile(single, fullgraph=True, backend="aot_eager")(x.clone(), **common)
        assert distance(compiled, single(x.clone(), **common)) <= 1e-6
        img, txt = x[:, :30], x[:, 30:]
        found = torch.compile(double, fullgraph=True, backend="aot_eager")(img=img.clone(), txt=txt.clone(), **common)
        expected = double(img=img.clone(), txt=txt.clone(), **common)
        assert distance(torch.cat(found, 1), torch.cat(expected, 1)) <= 1e-6


def test_a_compiled_model_follows_top_k_without_graph_breaks(host: Comfy, tmp_path: Path) -> None:
    """TorchCompileModel keeps transformer_options out of its guards: a graph must not be reused for another Top-K."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch._dynamo.utils import counters

    dims = replace(files.DIMS, double_blocks=1, single_blocks=1)  # quick to trace
    split = files.split(files.dense_flux(dims), dims, dense_double_blocks=0)
    moe = host.load(files.save(split, tmp_path / "moe.safetensors"))
    counters.clear()
    whole = TorchCompileModel.execute(moe, "eager").result[0]  # its own backends need a C++ compiler
    settings = [(2, "sum"), (0, "sum"), (ALL, "sum"), (2, "normalised"), (2, "sum")]
    for top_k, gate in settings:
        eager, compiled = host.top_k(moe, top_k, gate), host.top_k(whole, top_k, gate)
        assert distance(host.sample(compiled, steps=1), host.sample(eager, steps=1)) <= 1e-6
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == len(set(settings))


def test_block_patches_of_other_packs_are_called(host: Comfy, pair: Pair) -> None:
    """patches_replace["dit"], with blocks at their stock index and the stock arguments."""
    moe = host.top_k(pair.moe, 2)
    expected, seen = host.sample(moe), []

    def through(args: dict, extra: dict) -> dict:
        seen.append(args["transformer_options"]["block_index"])
        return extra["original_block"](args)

    patched = moe.clone()
    for kind, depth in (("double_block", files.DIMS.double_blocks), ("single_block", files.DIMS.single_blocks)):
        for i in range(depth):
            patched.set_model_patch_replace(through, "dit", kind, i)
    assert torch.equal(host.sample(patched), expected)
    assert seen[:5] == [0, 1, 0, 1, 2]


def test_attention_patches_see_the_stock_shapes(host: Comfy, pair: Pair) -> None:
    moe, shapes = pair.moe.clone(), []

    def look(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> dict:
        shapes.append(tuple(q.shape))
        return {"q": q * 0.5}

    moe.set_model_attn1_patch(look)
    changed = host.sample(moe, steps=1)
    assert set(shapes) == {(1, 1, 71, 128)}
    assert distance(changed, host.sample(pair.moe, steps=1)) >= 1e-3


def test_registering_twice_changes_nothing(host: Comfy) -> None:
    import comfy.lora
    import comfy.supported_models

    entries, load_lora = list(comfy.supported_models.models), comfy.lora.load_lora
    host.module("nodes.flux_moe").register()
    host.module("nodes.lora").register()
    assert entries == comfy.supported_models.models
    assert load_lora is comfy.lora.load_lora
    assert [entry.__name__ for entry in entries[:3]] == ["FluxMoEInpaint", "FluxMoEDev", "FluxMoESchnell"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch.compiler.reset()

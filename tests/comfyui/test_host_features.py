"""ComfyUI's own ways of running a model hold for a FLUX-MoE: low VRAM, patches of other packs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.converting import GIVEN
from tests.toys import files
from tests.toys.compare import distance

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
    host.module("nodes.model.flux_moe").register()
    host.module("nodes.lora.load_lora").register()
    assert entries == comfy.supported_models.models
    assert load_lora is comfy.lora.load_lora
    assert [entry.__name__ for entry in entries[:3]] == ["FluxMoEInpaint", "FluxMoEDev", "FluxMoESchnell"]


@pytest.mark.parametrize(
    ("node_id", "inputs", "name"),
    [
        ("D2MTopK", {"model": 5, "top_k": 2, "gate": "sum"}, "model"),
        ("D2MTraceRouting", {"model": "x"}, "model"),
        ("D2MSaveFluxMoE", {"model": None, "filename_prefix": "x"}, "model"),
        ("D2MConvertFlux", {**GIVEN, "model": {}}, "model"),
        (
            "D2MExpertMap",
            {"trace": 5, "step": 0, "block": 0, "prompt": "x", "opacity": 1.0, "numbers": False, "legend": False},
            "trace",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stands_in_place_of_a_link_is_said(host: Comfy, node_id: str, inputs: dict[str, Any], name: str) -> None:
    """ComfyUI passes on whatever a prompt's JSON has there."""
    with pytest.raises(ValueError, match=rf"{name} is .*\. Connect the output of another node"):
        host.run(node_id, **inputs)

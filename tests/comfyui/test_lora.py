"""A FLUX LoRA on a FLUX-MoE at all experts is the LoRA on the dense teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.comfyui import files
from tests.comfyui.conftest import Pair
from tests.comfyui.inside import Comfy, distance

ALL = files.LAYOUT.experts
DEVICE = torch.device("cpu")


def diffusers_lora(seed: int, rank: int = 4) -> dict[str, Tensor]:
    """On every FFN tensor and the attention of single blocks, in diffusers' names."""
    h, generator, lora = files.DIMS.hidden_size, torch.Generator().manual_seed(seed), {}

    def add(name: str, out: int, width: int) -> None:
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * width**-0.5
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3

    for i in range(files.DIMS.double_blocks):
        for ffn in ("ff", "ff_context"):
            add(f"transformer_blocks.{i}.{ffn}.net.0.proj", 4 * h, h)
            add(f"transformer_blocks.{i}.{ffn}.net.2", h, 4 * h)
    for i in range(files.DIMS.single_blocks):
        block = f"single_transformer_blocks.{i}"
        add(f"{block}.proj_mlp", 4 * h, h)
        add(f"{block}.proj_out", h, 5 * h)
        add(f"{block}.attn.to_q", h, h)
    return lora


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 0.8, bypass: bool = False) -> Any:
    import comfy.sd

    load = comfy.sd.load_bypass_lora_for_models if bypass else comfy.sd.load_lora_for_models
    return load(model, None, dict(lora), strength, 0)[0]


def test_a_lora_does_what_it_does_to_the_teacher(host: Comfy, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    lora = diffusers_lora(1)
    found = host.sample(host.top_k(with_lora(pair.moe, lora), ALL))
    expected = host.sample(with_lora(pair.teacher, lora))
    assert distance(found, expected) <= 1e-5
    assert distance(host.sample(pair.teacher), expected) >= 1e-2
    assert "not loaded" not in caplog.text.lower()


def test_without_the_neuron_order_it_would_not(host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: ComfyUI's own load_lora."""
    import comfy.lora

    lora = diffusers_lora(1)
    monkeypatch.setattr(comfy.lora, "load_lora", comfy.lora.load_lora.__wrapped__)
    found = host.sample(host.top_k(with_lora(pair.moe, lora), ALL))
    assert distance(found, host.sample(with_lora(pair.teacher, lora))) >= 1e-2


def test_loras_stack_and_come_off_again(host: Comfy, pair: Pair) -> None:
    one, two = diffusers_lora(1), diffusers_lora(2)
    before = host.sample(pair.moe)
    found = host.sample(host.top_k(with_lora(with_lora(pair.moe, one, 0.5), two, -0.7), ALL))
    expected = host.sample(with_lora(with_lora(pair.teacher, one, 0.5), two, -0.7))
    assert distance(found, expected) <= 1e-5
    assert torch.equal(host.sample(pair.moe), before)


def test_a_lora_moves_routed_experts_too(host: Comfy, pair: Pair) -> None:
    lora = {key: tensor for key, tensor in diffusers_lora(1).items() if "proj_mlp" in key}
    plain, tuned = host.top_k(pair.moe, 2), host.top_k(with_lora(pair.moe, lora), 2)
    assert distance(host.sample(tuned), host.sample(plain)) >= 1e-2


def test_in_low_vram_it_is_patched_on_the_fly(host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_patcher import LowVramPatch

    lora, calls, call = diffusers_lora(1), [], LowVramPatch.__call__

    def counted(self: LowVramPatch, weight: Tensor) -> Tensor:
        calls.append(self.key)
        return call(self, weight)

    monkeypatch.setattr(LowVramPatch, "__call__", counted)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    moe, teacher = host.top_k(with_lora(pair.moe, lora), ALL), with_lora(pair.teacher, lora)
    moe.load(DEVICE, lowvram_model_memory=1)
    found = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    assert len(set(calls)) == len(moe.patches) > 0
    teacher.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    expected = host.evaluate(teacher)
    teacher.unpatch_model(DEVICE)
    assert distance(found, expected) <= 1e-5


def test_a_patch_can_be_rebuilt_as_comfyui_does_when_it_prefetches(host: Comfy, pair: Pair) -> None:
    import comfy.lora

    moe = with_lora(pair.moe, diffusers_lora(1))
    key = "diffusion_model.single_blocks.0.linear2.weight"
    weight = pair.split["single_blocks.0.linear2.weight"]
    patches = moe.patches[key]
    rebuilt = [(p[0], type(p[1])(p[1].loaded_keys, p[1].weights), *p[2:]) for p in patches]
    expected = comfy.lora.calculate_weight(patches, weight.clone(), key)
    assert torch.equal(comfy.lora.calculate_weight(rebuilt, weight.clone(), key), expected)
    assert not torch.equal(expected, weight)
    if hasattr(comfy.lora, "prefetch_prepared_value"):  # ComfyUI 0.30
        size = [0]
        comfy.lora.prefetch_prepared_value(patches[0][1], size, None, None, False)
        buffer = torch.empty(size[0], dtype=torch.uint8)
        prepared = comfy.lora.prefetch_prepared_value(patches[0][1], [0], buffer, None, True)
        prefetched = [(patches[0][0], prepared, *patches[0][2:])]
        assert torch.equal(comfy.lora.calculate_weight(prefetched, weight.clone(), key), expected)


def test_bypass_mode_reaches_the_experts(host: Comfy, pair: Pair) -> None:
    lora = diffusers_lora(1)
    found = host.sample(host.top_k(with_lora(pair.moe, lora, bypass=True), ALL))
    assert distance(found, host.sample(with_lora(pair.teacher, lora))) <= 1e-5

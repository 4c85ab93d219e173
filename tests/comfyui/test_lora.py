"""A FLUX LoRA on a FLUX-MoE at all experts is the LoRA on the dense teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.toys import files
from tests.toys.compare import distance

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


# What is no LoRA for this model


def of_shape(key: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": torch.randn(4, columns), f"{key}.lora_B.weight": torch.randn(rows, 4)}


# What other models' LoRAs have under names that FLUX.1 knows too.
STRANGERS = {
    "SD3": of_shape("transformer.transformer_blocks.0.ff.net.0.proj", 6144, 1536),
    "FLUX.2": of_shape("diffusion_model.single_blocks.0.linear1", 55296, 6144),
    "FLUX.2, diffusers": of_shape("transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj", 55296, 6144),
    "LoKr": {
        "lycoris_transformer_blocks_0_ff_net_2.lokr_w1": torch.randn(16, 16),
        "lycoris_transformer_blocks_0_ff_net_2.lokr_w2": torch.randn(96, 384),
    },
    "OFT": {"lora_unet_single_blocks_2_linear2.oft_blocks": torch.randn(96, 16, 16)},
    "diff": {"diffusion_model.double_blocks.1.txt_mlp.2.diff": torch.randn(1536, 6144)},
    "bias": {"diffusion_model.double_blocks.1.txt_mlp.0.diff_b": torch.randn(6144)},
    # Of as many elements as linear2 [128, 640], which ComfyUI would reshape it to.
    "other sides": of_shape("diffusion_model.single_blocks.0.linear2", 640, 128),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_lora_of_another_size_is_refused_whole(host: Comfy, pair: Pair, stranger: str) -> None:
    """Also where a part of it would fit."""
    fitting = {key: tensor for key, tensor in diffusers_lora(1).items() if "to_q" in key}
    lora, before = {**fitting, **STRANGERS[stranger]}, host.sample(pair.moe)
    with pytest.raises(ValueError, match="made for another model") as refusal:
        with_lora(pair.moe, lora)
    message = str(refusal.value)
    assert "(1 of its 4 changes do not fit)" in message
    assert "Nothing of it was applied" in message
    assert " here and [" in message  # both shapes
    assert torch.equal(host.sample(pair.moe), before)


def test_the_refusal_names_tensor_and_shapes(host: Comfy, pair: Pair) -> None:
    with pytest.raises(
        ValueError, match=r"double_blocks\.0\.img_mlp\.0\.weight is \[512, 128\] here and \[6144, 1536\]"
    ):
        with_lora(pair.moe, STRANGERS["SD3"])
    with pytest.raises(ValueError, match=r"single_blocks\.2\.linear2\.weight is \[128, 640\] here and \[1536, any\]"):
        with_lora(pair.moe, STRANGERS["OFT"])


def test_what_does_not_fit_outside_the_blocks_is_left_out(
    host: Comfy, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """img_in differs between FLUX.1's variants: a LoRA of Fill's is of use to dev."""
    lora = {**diffusers_lora(1), **of_shape("transformer.x_embedder", 128, 384)}
    found = with_lora(pair.moe, lora)
    assert (
        "a part of this LoRA does not fit and is left out: img_in.weight is [128, 64] here and [128, 384]"
        in caplog.text
    )
    assert set(found.patches) == set(with_lora(pair.moe, diffusers_lora(1)).patches)


def test_a_lora_with_nothing_for_flux_is_called_so_once(
    host: Comfy, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    sdxl = {
        f"lora_unet_input_blocks_{i}_1_proj_in.lora_{x}.weight": torch.randn(4, 4)
        for i in (4, 5)
        for x in ("up", "down")
    }
    before = host.sample(pair.moe)
    found = with_lora(pair.moe, sdxl)
    assert not found.patches
    assert torch.equal(host.sample(found), before)
    (line,) = (record.message for record in caplog.records if "FLUX-MoE" in record.message)
    assert "nothing for FLUX.1" in line
    assert "none of its 4 tensors" in line
    assert "lora_unet_input_blocks_4" in line


def test_a_lora_of_text_encoders_alone_is_no_stranger(
    host: Comfy, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    with_lora(pair.moe, of_shape("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8))
    assert "FLUX-MoE" not in caplog.text


def test_a_part_of_the_neurons_cannot_be_changed(host: Comfy, pair: Pair) -> None:
    """ComfyUI's key map has no such entry; another pack's may."""
    import comfy.lora

    key_map = comfy.lora.model_lora_keys_unet(pair.moe.model, {})
    name = key_map["diffusion_model.single_blocks.0.linear1"]
    key_map["half"] = (name, (0, 3 * 128, 256))
    with pytest.raises(ValueError, match=r"rows 384 to 640 of .*linear1\.weight, a part of the FFN .* rows 384 to 896"):
        comfy.lora.load_lora(of_shape("half", 256, 128), key_map)


def test_dense_models_load_loras_as_ever(host: Comfy, pair: Pair) -> None:
    import comfy.lora

    teacher = with_lora(pair.teacher, {**diffusers_lora(1), **STRANGERS["SD3"]})
    assert "diffusion_model.double_blocks.0.img_mlp.0.weight" in teacher.patches
    comfy.lora.model_lora_keys_unet(pair.moe.model)  # by ComfyUI's default one key map for all models
    key_map = comfy.lora.model_lora_keys_unet(pair.teacher.model)
    assert {type(target if isinstance(target, str) else target[0]) for target in key_map.values()} == {str}

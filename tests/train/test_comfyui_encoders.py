"""Encoders in ComfyUI's single files give what the same weights give in a diffusers pipeline."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2m_train import UserError
from d2m_train.data.encoders import FluxAutoencoder, FluxTextEncoders
from tests.toys.pipeline import save_pipeline

PROMPTS = ("a red cat on a hill", "tree")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose CLIP has heads of 64 channels, or one, as CLIP-L has."""
    folder = save_pipeline(tmp_path_factory.mktemp("pipeline") / "flux")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 1}))
    return folder


@pytest.fixture
def comfyui(pipeline: Path, tmp_path: Path) -> Path:
    """A ComfyUI's folder of text encoders, within a ComfyUI that has the tokenizers."""
    folder = tmp_path / "ComfyUI" / "models" / "text_encoders"
    folder.mkdir(parents=True)
    clip = folder / "clip_l.safetensors"
    shutil.copy(pipeline / "text_encoder" / "model.safetensors", clip)
    shutil.copy(pipeline / "text_encoder_2" / "model.safetensors", folder / "t5xxl_fp16.safetensors")
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(clip).items()}
    save_file(weights, clip)  # names as published, whatever transformers writes
    for part, place in (("tokenizer", "sd1_tokenizer"), ("tokenizer_2", "text_encoders/t5_tokenizer")):
        shutil.copytree(pipeline / part, tmp_path / "ComfyUI" / "comfy" / place)
    config = tmp_path / "ComfyUI" / "comfy" / "sd1_tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 8192}))  # as ComfyUI's has it
    return folder


def encode(name: Path) -> list[Tensor]:
    return list(FluxTextEncoders(str(name), 12, torch.float32).encode(PROMPTS))


def test_clip_and_t5_encode_as_in_a_pipeline(pipeline: Path, comfyui: Path) -> None:
    for found, expected in zip(encode(comfyui), encode(pipeline), strict=True):
        assert torch.equal(found, expected)


def test_a_scaled_float8_file_is_read_at_its_scale(comfyui: Path) -> None:
    expected = encode(comfyui)[0]
    file = comfyui / "t5xxl_fp16.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if name.endswith((".q.weight", ".wi.weight"))]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name.removesuffix('weight')}scale_weight"] = scale[None]
    save_file(weights | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, file)
    found = encode(comfyui)[0]
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_what_is_missing_is_said(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    tokenizers = comfyui.parents[1] / "comfy"
    tokenizers.rename(comfyui.parents[1] / "elsewhere")
    with pytest.raises(UserError, match="has the weights but no tokenizer"):
        encode(comfyui)
    (comfyui.parents[1] / "other").mkdir()
    (comfyui.parents[1] / "elsewhere").rename(comfyui.parents[1] / "other" / "comfy")
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui.parents[1] / "other"))
    encode(comfyui)
    weights = load_file(comfyui / "clip_l.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.0.mlp.fc2.weight")))
    save_file(weights, comfyui / "clip_l.safetensors")
    with pytest.raises(UserError, match=r"clip_l.safetensors: has no .*fc2.weight"):
        encode(comfyui)
    shutil.copy(comfyui / "t5xxl_fp16.safetensors", comfyui / "t5xxl_fp8.safetensors")
    with pytest.raises(UserError, match=r"t5xxl_fp16.safetensors, t5xxl_fp8.safetensors; expected one t5xxl file"):
        encode(comfyui)


def bfl_name(name: str) -> str:
    """Translate a name of diffusers' autoencoder to the one in ae.safetensors."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{3 - int(found[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in (
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        name = name.replace(ours, theirs)
    return name


def test_the_autoencoders_file_is_read_in_both_namings(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=16, sample_size=1024,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    weights = model.state_dict()
    save_file(weights, tmp_path / "diffusers.safetensors")
    linear = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    bfl = {bfl_name(name): tensor for name, tensor in weights.items()}
    bfl = {name: tensor[..., None, None] if name.endswith(linear) else tensor for name, tensor in bfl.items()}
    save_file({name: tensor.contiguous() for name, tensor in bfl.items()}, tmp_path / "ae.safetensors")
    image = torch.rand(1, 3, 32, 32)
    folder = FluxAutoencoder(str(tmp_path / "vae"), torch.float32)
    expected = folder.encode(image)
    for name in ("ae.safetensors", "diffusers.safetensors"):
        single = FluxAutoencoder(str(tmp_path / name), torch.float32)
        assert torch.equal(single.encode(image), expected)
        assert torch.equal(single.decode(expected), folder.decode(expected))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is not FLUX's autoencoder"):
        FluxAutoencoder(str(tmp_path / "other.safetensors"), torch.float32).encode(image)

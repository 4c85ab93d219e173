"""The emoji FLUX in ComfyUI: its model files, and its prompt node with a prompt encoder of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.dataset import EMOJI_FLUX_MOE
from demo.in_process import Comfy
from demo.models import AUTOENCODER, CONVERTED
from demo.prompt_encoder import PROMPT_TOKENS, WIDTH, PromptEncoder
from demo.template_graphs import TEMPLATES, Template


@pytest.mark.parametrize("template", [it for it in TEMPLATES if it.runs], ids=lambda template: template.name)
def test_every_file_of_a_template_is_there_after_installing(host: Comfy, template: Template) -> None:
    import folder_paths

    widgets = {
        "model_name": "diffusion_models",
        "unet_name": "diffusion_models",
        "vae_name": "vae",
        "lora_name": "loras",
    }
    files = [
        (widgets[name], value)
        for node in template.graph.values()
        for name, value in node["inputs"].items()
        if name in widgets
    ]
    assert files
    for folder, name in files:
        assert name in folder_paths.get_filename_list(folder)


def test_a_file_of_the_user_comes_before_one_of_the_demo(host: Comfy) -> None:
    import folder_paths

    shipped = EMOJI_FLUX_MOE.parent
    own = host.base / "models" / "diffusion_models" / EMOJI_FLUX_MOE.name
    assert folder_paths.get_full_path("diffusion_models", own.name) == str(shipped / own.name)
    own.parent.mkdir(parents=True, exist_ok=True)
    own.touch()
    try:
        assert folder_paths.get_full_path("diffusion_models", own.name) == str(own)
    finally:
        own.unlink()


def test_the_demo_s_files_paint(host: Comfy) -> None:
    model = host.run("D2MLoadFluxMoE", model_name=CONVERTED, weight_dtype="default")
    latent = host.sample(model, steps=1)
    assert host.run("VAEDecode", samples={"samples": latent}, vae=host.run("VAELoader", vae_name=AUTOENCODER)).shape == (
        1, 128, 128, 3,
    )  # fmt: skip


def test_words_become_conditioning(host: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    file = tmp_path / "prompt-encoder.safetensors"
    PromptEncoder(["fox", "blue"]).save(file)
    monkeypatch.setattr(host.module("nodes.demo"), "_ENCODER", file)
    ((context, rest),) = host.run("D2MEmojiPrompt", text="fox on blue", guidance=2.0)
    assert context.shape == (1, PROMPT_TOKENS, WIDTH)
    assert rest["pooled_output"].shape == (1, WIDTH)
    assert rest["guidance"] == 2.0
    ((other, _),) = host.run("D2MEmojiPrompt", text="blue fox", guidance=2.0)
    assert not torch.equal(context, other)


def test_a_missing_encoder_is_said(host: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.module("nodes.demo"), "_ENCODER", tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="install the pack again"):
        host.run("D2MEmojiPrompt", text="fox", guidance=2.0)

"""The emoji FLUX's prompt node, with a prompt encoder of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.in_process import Comfy
from demo.prompt_encoder import PROMPT_TOKENS, WIDTH, PromptEncoder


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

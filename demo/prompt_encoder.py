"""The emoji FLUX's prompt encoder: words to context and pooled vector. It was trained together with the transformer.

It is pure torch, and one file has weights and vocabulary, so that the ComfyUI node needs nothing else.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 128
PROMPT_TOKENS = 12  # length to which every prompt is padded, as FLUX pads to 512
PADDING, UNKNOWN = 0, 1


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words and commas."""
    return re.findall(r"[a-z0-9]+|,", text.lower())


def padded_words(text: str) -> list[str]:
    """Return the word of each of the PROMPT_TOKENS tokens; "" is padding."""
    words = words_of(text)[:PROMPT_TOKENS]
    return words + [""] * (PROMPT_TOKENS - len(words))


class PromptEncoder(nn.Module):
    """Word embeddings and two transformer layers. All words outside the vocabulary share one embedding."""

    def __init__(self, vocabulary: list[str]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.index = {word: number for number, word in enumerate(vocabulary, start=2)}
        self.word = nn.Embedding(len(vocabulary) + 2, WIDTH)
        self.place = nn.Parameter(torch.randn(PROMPT_TOKENS, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            nhead=4,
            dim_feedforward=2 * WIDTH,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.pool = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(self.word.weight, std=0.5)

    def tokens(self, prompts: list[str]) -> Tensor:
        """Return tokens [B, PROMPT_TOKENS], int64; longer prompts are cut, shorter ones padded."""
        rows = []
        for prompt in prompts:
            row = [self.index.get(word, UNKNOWN) for word in words_of(prompt)][:PROMPT_TOKENS]
            rows.append(row + [PADDING] * (PROMPT_TOKENS - len(row)))
        return torch.tensor(rows)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens [B, PROMPT_TOKENS] to context [B, PROMPT_TOKENS, WIDTH] and pooled vector [B, WIDTH]."""
        context = self.layers(self.word(tokens) + self.place)
        return context, self.pool(context.mean(1))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts to context [B, PROMPT_TOKENS, WIDTH] and pooled vector [B, WIDTH], float32."""
        return self(self.tokens(prompts))

    def save(self, file: Path) -> None:
        """Write weights (float16) and vocabulary."""
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(
            tensors,
            file,
            metadata={
                "vocabulary": json.dumps(self.vocabulary),
                "modelspec.title": "Emoji FLUX prompt encoder",
            },
        )


def load_prompt_encoder(file: Path) -> PromptEncoder:
    """Read a prompt encoder, float32 and frozen. Raises ValueError for another kind of file."""
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() or {}
        if "vocabulary" not in metadata:
            raise ValueError(
                f"{file} has no vocabulary in its header; expected a prompt encoder of the emoji FLUX (demo/assets)."
            )
        tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118 (not a dict)
    encoder = PromptEncoder(json.loads(metadata["vocabulary"]))
    encoder.load_state_dict(tensors)
    return encoder.eval().requires_grad_(False)

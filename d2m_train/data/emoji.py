"""The demo's dataset as a source: any number of real images."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from .batch import GUIDANCE, Batch, Progress, Texts, batch_of, latents_of


def asset(name: str, assets: Path | None = None) -> Path:
    """A file of the demo's. Raises UserError if it is not there."""
    file = (assets or _demo("dataset").ASSETS) / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"{file} is missing; demo/README.md says how to make it.")
    return Path(file)


class EmojiTextEncoders:
    """The demo's prompt encoder in the place of CLIP and T5."""

    def __init__(self, assets: Path | None = None) -> None:
        file = asset("prompt-encoder", assets)
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        self.encoder = _demo("prompt_encoder").load(file)

    def encode(self, prompts: Sequence[str]) -> Texts:
        context, pooled = self.encoder.encode(list(prompts))
        return Texts(context, pooled, self.encoder.tokens(list(prompts)) != 0)

    def release(self) -> None:
        """It is small: nothing."""


class EmojiAutoencoder:
    """The demo's autoencoder in the place of FLUX's."""

    def __init__(self, assets: Path | None = None) -> None:
        file = asset("autoencoder", assets)
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        self.autoencoder = _demo("autoencoder").Autoencoder.load(file)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # off by 0.7 %, in half the time
            latents: Tensor = self.autoencoder.encode(images)
        return latents.float()

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.autoencoder.decode(latents)
        return images

    def release(self) -> None:
        """It is small: nothing."""


class EmojiData:
    """Through the demo's autoencoder and prompt encoder: any number of real images."""

    name = identity = "emoji"

    def __init__(self, assets: Path | None = None, *, guidance: tuple[float, float] = GUIDANCE) -> None:
        self.dataset = _demo("dataset")
        self.guidance = guidance
        self.autoencoder = EmojiAutoencoder(assets)
        self.text_encoders = EmojiTextEncoders(assets)

    def prepare(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
        """Nothing: pictures are made as they are asked for."""

    def batch(self, index: int, size: int, seed: int) -> Batch:
        generator = np.random.default_rng((seed, index))
        pictures = [self.dataset.random_picture(generator) for _ in range(size)]
        latents = self.autoencoder.encode(torch.stack([self.dataset.render(picture) for picture in pictures]))
        templates = generator.integers(len(self.dataset.TEMPLATES), size=size)
        captions = [picture.caption(int(template)) for picture, template in zip(pictures, templates, strict=True)]
        context, pooled, words = self.encode_prompts(captions)
        guidance = torch.from_numpy(generator.uniform(*self.guidance, size))
        return batch_of(latents, context, pooled, guidance, words)

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """[B, 3, 128, 128] in 0..1."""
        return self.autoencoder.decode(latents_of(tokens_BTC, image_ids_T3))

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        return self.text_encoders.encode(prompts)


def _demo(module: str) -> Any:
    """A module of the demo, which is imported here alone: without it every other command works."""
    try:
        return importlib.import_module(f"demo.{module}")
    except ModuleNotFoundError as error:
        if error.name != "demo":
            raise
        raise UserError("The emoji dataset is the demo's: run from the repository's root.") from None

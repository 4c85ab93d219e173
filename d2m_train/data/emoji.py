"""The demo's dataset as a source: any number of real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .. import UserError
from .batch import GUIDANCE, Batch, batch_of


class EmojiData:
    """Through the demo's autoencoder and prompt encoder: any number of real images."""

    name = identity = "emoji"

    # The demo is imported here alone: without it every other command works.

    def __init__(self, assets: Path | None = None) -> None:
        try:
            from demo import autoencoder, dataset, prompt_encoder
        except ModuleNotFoundError as error:
            if error.name != "demo":
                raise
            raise UserError("--data emoji is the demo's dataset: run from the repository's root.") from None
        assets = assets or dataset.ASSETS
        for asset in ("autoencoder", "prompt-encoder"):
            if not (assets / f"{asset}.safetensors").is_file():
                raise UserError(f"{assets / asset}.safetensors is missing; demo/README.md says how to make it.")
        self.dataset = dataset
        self.autoencoder = autoencoder.Autoencoder.load(assets / "autoencoder.safetensors")
        self.prompts = prompt_encoder.load(assets / "prompt-encoder.safetensors")

    def batch(self, index: int, size: int, seed: int) -> Batch:
        generator = np.random.default_rng((seed, index))
        pictures = [self.dataset.random_picture(generator) for _ in range(size)]
        images = torch.stack([self.dataset.render(picture) for picture in pictures])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # most of the time goes here; off by 0.7 %
            latents = self.autoencoder.encode(images)
        templates = generator.integers(len(self.dataset.TEMPLATES), size=size)
        captions = [picture.caption(int(template)) for picture, template in zip(pictures, templates, strict=True)]
        context, pooled = self.prompts.encode(captions)
        guidance = torch.from_numpy(generator.uniform(*GUIDANCE, size))
        return batch_of(latents, context, pooled, guidance, self.prompts.tokens(captions) != 0)

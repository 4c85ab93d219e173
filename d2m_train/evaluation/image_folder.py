"""Folder of images of many prompts in GenEval's layout. Sampling can be interrupted; existing images are kept.

00000/metadata.jsonl          the prompt's line of evaluation_metadata.jsonl
00000/samples/0000.png …      one per seed
00000/latents/0000.safetensors …  the images' latents, if a distance is measured
sampled.json                  settings of the images; a folder with other settings is refused
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2m_model.atomic import atomic_file
from d2m_model.foreign import read_json

from .. import UserError
from ..flow.noise import channels_of
from ..flow.sampling import noise_for, pil_image, sample, save_png
from .prompts import Encoders, Prompt

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_SEEDS_APART = 100_000  # between a prompt's images, so that no two images of a set have the same noise


class ImageFolder:
    """Images of `prompts`, `seeds` for each."""

    def __init__(
        self, folder: Path, prompts: Sequence[Prompt], *, seeds: int, keep_latents: bool, made: dict[str, Any]
    ) -> None:
        """`made`: settings of the images. Raises UserError if the folder has images with other settings."""
        self.folder, self.prompts, self.seeds, self.keep_latents = folder, prompts, seeds, keep_latents
        self.made, self.marker = made, folder / "sampled.json"
        if self.marker.exists():
            try:
                stored = dict(read_json(self.marker.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{self.marker}: cannot be read ({error}); delete {folder}, or name another.") from None
            differs = [
                f"{key} {stored.get(key)!r}, now {value!r}" for key, value in made.items() if stored.get(key) != value
            ]
            if differs:
                raise UserError(
                    f"{folder} has images with other settings: {'; '.join(differs)}. Name another folder with --out, or "
                    "delete it."
                )

    def image_file(self, prompt: Prompt, number: int) -> Path:
        return self.folder / f"{prompt.index:05}" / "samples" / f"{number:04}.png"

    def latents_file(self, prompt: Prompt, number: int) -> Path:
        return self.folder / f"{prompt.index:05}" / "latents" / f"{number:04}.safetensors"

    def missing(self) -> list[tuple[Prompt, int]]:
        """Return the prompts and numbers of images that are missing."""
        return [
            (prompt, number)
            for prompt in self.prompts
            for number in range(self.seeds)
            if not self.image_file(prompt, number).is_file()
            or (self.keep_latents and not self.latents_file(prompt, number).is_file())
        ]

    def put(self, prompt: Prompt, number: int, image: Tensor, tokens_TC: Tensor) -> None:
        """Write an image and its files; the image last, since it marks them as complete."""
        folder = self.folder / f"{prompt.index:05}"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.marker.exists():
            with atomic_file(self.marker) as part:
                part.write_text(json.dumps(self.made, indent=1) + "\n")
        (folder / "metadata.jsonl").write_text(json.dumps(prompt.metadata))
        if self.keep_latents:
            file = self.latents_file(prompt, number)
            file.parent.mkdir(exist_ok=True)
            with atomic_file(file) as part:
                save_file({"tokens": tokens_TC.contiguous()}, part)
        save_png(pil_image(image), self.image_file(prompt, number))

    def images(self, number: int) -> Tensor:
        """Return image `number` of every prompt, uint8 [prompts, 3, height, width]."""
        import numpy as np
        from PIL import Image

        files = [self.image_file(prompt, number) for prompt in self.prompts]
        return torch.stack(
            [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]
        )

    def latents(self, number: int) -> Tensor:
        """Return the latents [prompts, T, C] of image `number` of every prompt."""
        return torch.stack([load_file(self.latents_file(prompt, number))["tokens"] for prompt in self.prompts])

    def seed_of(self, prompt: Prompt, number: int, first: int) -> int:
        return first + prompt.index + _SEEDS_APART * number


@torch.no_grad()
def sample_missing(
    folder: ImageFolder,
    load_model: Callable[[], FluxTransformer2DModel],
    encoders: Encoders,
    *,
    steps: int,
    guidance: float,
    shift: Callable[[bool], float],
    seed: int,
    batch: int,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Sample missing images. The model is loaded only if there are any. `shift` returns mu for a guided or unguided model."""
    missing = folder.missing()
    if not missing:
        return
    model = load_model()
    guided = bool(model.config.guidance_embeds)
    for start in range(0, len(missing), batch):
        some = missing[start : start + batch]
        inputs = encoders.batch([prompt.text for prompt, _ in some], guidance)
        seeds = [folder.seed_of(prompt, number, seed) for prompt, number in some]
        noise_BTC = noise_for(seeds, inputs.image_ids_T3, channels_of(model))
        tokens_BTC = sample(model, inputs, noise_BTC, steps=steps, mu=shift(guided), size=batch)
        images = encoders.images(tokens_BTC, inputs.image_ids_T3)
        for (prompt, number), image, tokens_TC in zip(some, images, tokens_BTC, strict=True):
            folder.put(prompt, number, image, tokens_TC)
        progress(len(some))

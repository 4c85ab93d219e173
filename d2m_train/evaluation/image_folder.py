"""Images of many prompts in GenEval's layout, made bit by bit: what is there is kept.

00000/metadata.jsonl          the prompt's line of evaluation_metadata.jsonl
00000/samples/0000.png …      one for each seed
00000/latents/0000.safetensors …  what the image was decoded from, where a distance is to be measured
sampled.json                  how they were made; a folder of other settings is refused
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

from .. import UserError
from ..flow.noise import channels_of
from ..flow.sampling import noise_for, pil_image, sample, save_png
from .prompts import Encoders, Prompt

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_SEEDS_APART = 100_000  # from a prompt's first image to its next, so that no two images of a set have the same noise


class ImageFolder:
    """The images of `prompts`, `seeds` of each."""

    def __init__(
        self, folder: Path, prompts: Sequence[Prompt], *, seeds: int, keep_latents: bool, made: dict[str, Any]
    ) -> None:
        """`made`: how the images are made. Raises UserError if the folder has images that were made otherwise."""
        self.folder, self.prompts, self.seeds, self.keep_latents = folder, prompts, seeds, keep_latents
        self.made, self.marker = made, folder / "sampled.json"
        if self.marker.exists():
            found = json.loads(self.marker.read_text())
            differs = [
                f"{key} {found.get(key)!r}, now {value!r}" for key, value in made.items() if found.get(key) != value
            ]
            if differs:
                raise UserError(
                    f"{folder} has images made otherwise: {'; '.join(differs)}. Name another folder with --out, or delete it."
                )

    def image_file(self, prompt: Prompt, number: int) -> Path:
        return self.folder / f"{prompt.index:05}" / "samples" / f"{number:04}.png"

    def latents_file(self, prompt: Prompt, number: int) -> Path:
        return self.folder / f"{prompt.index:05}" / "latents" / f"{number:04}.safetensors"

    def missing(self) -> list[tuple[Prompt, int]]:
        """Prompts and the numbers of their images that are still to be made."""
        return [
            (prompt, number)
            for prompt in self.prompts
            for number in range(self.seeds)
            if not self.image_file(prompt, number).is_file()
            or (self.keep_latents and not self.latents_file(prompt, number).is_file())
        ]

    def put(self, prompt: Prompt, number: int, image: Tensor, tokens_TC: Tensor) -> None:
        """The image last, since its file says that all is there."""
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
        """Image `number` of every prompt, uint8 [prompts, 3, height, width]."""
        import numpy as np
        from PIL import Image

        files = [self.image_file(prompt, number) for prompt in self.prompts]
        return torch.stack(
            [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]
        )

    def latents(self, number: int) -> Tensor:
        """[prompts, T, C]."""
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
    """Make what is missing. The model is loaded only if anything is. `shift` gives mu, told whether the model is guided."""
    missing = folder.missing()
    if not missing:
        return
    model = load_model()
    guided = bool(model.config.guidance_embeds)
    for start in range(0, len(missing), batch):
        some = missing[start : start + batch]
        asked = encoders.batch([prompt.text for prompt, _ in some], guidance)
        seeds = [folder.seed_of(prompt, number, seed) for prompt, number in some]
        noise_BTC = noise_for(seeds, asked.image_ids_T3, channels_of(model))
        tokens_BTC = sample(model, asked, noise_BTC, steps=steps, mu=shift(guided), size=batch)
        images = encoders.images(tokens_BTC, asked.image_ids_T3)
        for (prompt, number), image, tokens_TC in zip(some, images, tokens_BTC, strict=True):
            folder.put(prompt, number, image, tokens_TC)
        progress(len(some))

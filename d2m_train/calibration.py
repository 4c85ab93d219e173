"""Calibration data.

Shapes: B batch, T image tokens, C channels of a token, L text tokens, D context width, V pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from d2m_model.config import FluxDims
from d2m_model.tensor_file import TensorFile

from . import UserError

GUIDANCE = (1.5, 5.0)  # a guidance-distilled teacher is asked with values of this range
FILE_FORMAT = (
    "a .safetensors with `latents` [N, channels, height, width] in FLUX's model space ((latent - 0.1159) * 0.3611), "
    "`context` [N, text tokens, width], `pooled` [N, width], and optionally `guidance` [N] and `text_tokens` [N] (how many "
    "of the text tokens are not padding)"
)


@dataclass(kw_only=True, slots=True)
class CalibrationBatch:
    """What a FLUX is asked with, but for noise and timestep. Float32, on the CPU."""

    tokens_BTC: Tensor
    context_BLD: Tensor
    pooled_BV: Tensor
    guidance_B: Tensor
    image_ids_T3: Tensor
    text_ids_L3: Tensor
    words_BL: Tensor  # bool: False for padding, which calibration leaves out where it can


class CalibrationData(Protocol):
    """A source of samples. `name` stands in the file's provenance; `identity` changes when the data do."""

    name: str
    identity: str

    def batch(self, index: int, size: int, seed: int) -> CalibrationBatch:
        """Number `index` of an endless sequence that depends on size and seed alone."""
        ...


def batch_of(
    latents: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor, words_BL: Tensor | None = None
) -> CalibrationBatch:
    """From latents [B, channels, height, width], cut into FLUX's 2 x 2 patches. Without `words_BL` nothing is padding."""
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return CalibrationBatch(
        tokens_BTC=rearrange(latents.float(), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        context_BLD=context.float(),
        pooled_BV=pooled.float(),
        guidance_B=guidance.float(),
        image_ids_T3=ids.flatten(0, 1),
        text_ids_L3=torch.zeros(context.shape[1], 3),
        words_BL=torch.ones(context.shape[:2], dtype=torch.bool) if words_BL is None else words_BL,
    )


class EmojiData:
    """The demo's dataset through the demo's autoencoder and prompt encoder: any number of real images."""

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

    def batch(self, index: int, size: int, seed: int) -> CalibrationBatch:
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


class FileData:
    """Precomputed latents and text features, so that a real FLUX is calibrated without its text encoders."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.file = TensorFile(path)
        self.identity = f"{path.absolute()}, {self.file.size} bytes, modified {path.stat().st_mtime_ns}"
        shapes = self.file.shapes
        axes = {"latents": 4, "context": 3, "pooled": 2} | {
            name: 1 for name in ("guidance", "text_tokens") if name in shapes
        }
        for name, count in axes.items():
            found = shapes.get(name)
            if found is None or len(found) != count or found[0] != shapes["latents"][0]:
                raise UserError(f"{path}: {name} is {found and list(found)}; expected {FILE_FORMAT}.")
        if shapes["latents"][2] % 2 or shapes["latents"][3] % 2 or shapes["latents"][0] == 0:
            raise UserError(f"{path}: latents is {list(shapes['latents'])}; expected samples of even height and width.")

    def batch(self, index: int, size: int, seed: int) -> CalibrationBatch:
        """The samples in random order, in another one when they run out."""
        tensors = {name: self.file.tensor(name) for name in self.file.shapes}
        samples = len(tensors["latents"])
        places = range(index * size, (index + 1) * size)
        orders = {
            turn: np.random.default_rng((seed, turn)).permutation(samples) for turn in {p // samples for p in places}
        }
        chosen = torch.tensor([orders[place // samples][place % samples] for place in places])
        context = tensors["context"][chosen]
        guidance = torch.from_numpy(np.random.default_rng((seed, index, 1)).uniform(*GUIDANCE, size))
        if "guidance" in tensors:
            guidance = tensors["guidance"][chosen]
        words_BL = None
        if "text_tokens" in tensors:
            words_BL = torch.arange(context.shape[1]) < tensors["text_tokens"][chosen, None]
        return batch_of(tensors["latents"][chosen], context, tensors["pooled"][chosen], guidance, words_BL)


def open_data(name: str) -> CalibrationData:
    """`emoji`, or the path of a file of FILE_FORMAT."""
    return EmojiData() if name == "emoji" else FileData(Path(name))


def check_fits(batch: CalibrationBatch, dims: FluxDims) -> None:
    """Raises UserError if the data are not of this FLUX's widths."""
    for what, found, expected in (
        ("image tokens", batch.tokens_BTC.shape[-1], dims.in_channels),
        ("context", batch.context_BLD.shape[-1], dims.context_size),
        ("pooled text", batch.pooled_BV.shape[-1], dims.vector_size),
    ):
        if found != expected:
            raise UserError(f"The calibration data's {what} are {found} wide; this teacher's are {expected}.")

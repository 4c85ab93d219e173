"""Batches of inputs for calibration and training, and the interface of sources that give them.

Shapes: B batch, T image tokens, C channels of a token, L text tokens, D context width, V pooled width, P pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from d2m_model.config import PATCH_LATENTS, PATCH_PIXELS, FluxDims
from d2m_model.conversion.calibration import GUIDANCE as GUIDANCE

from .. import UserError

Progress = Callable[[int, int], object]  # called with the number of finished samples and the total


@dataclass(kw_only=True, slots=True)
class Batch:
    """Inputs of a FLUX except noise and timestep. Float32, on the CPU."""

    tokens_BTC: Tensor | None  # None: prompts only
    context_BLD: Tensor
    pooled_BV: Tensor
    guidance_B: Tensor
    image_ids_T3: Tensor
    text_ids_L3: Tensor
    words_BL: Tensor  # bool: False for padding, which calibration leaves out where possible
    captions: tuple[str, ...] = ()  # as text, where the source knows them

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with its inputs changed, all but `words_BL`, which the host reads."""
        return replace(
            self,
            tokens_BTC=None if self.tokens_BTC is None else change(self.tokens_BTC),
            context_BLD=change(self.context_BLD),
            pooled_BV=change(self.pooled_BV),
            guidance_B=change(self.guidance_B),
            image_ids_T3=change(self.image_ids_T3),
            text_ids_L3=change(self.text_ids_L3),
        )

    def images(self) -> Tensor:
        """Return tokens_BTC. Raises UserError if the batch has prompts only."""
        if self.tokens_BTC is None:
            raise UserError("The data are prompts only; calibration needs images or precomputed latents.")
        return self.tokens_BTC


class Texts(NamedTuple):
    """Encoded prompts, float32, and a bool for each text token: False for padding. On the CPU."""

    context_BLD: Tensor
    pooled_BV: Tensor
    words_BL: Tensor


class DataSource(Protocol):
    """A source of samples. `name` is written to the file's provenance."""

    name: str

    @property
    def identity(self) -> str:
        """Identity of the contents of the data: it changes whenever they do."""
        ...

    def prepare(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
        """Encode this rank's share of what `batch` reads, so that training needs no encoders; can be interrupted.

        Every rank has to call it, and then to wait for the others.
        """
        ...

    def batch(self, index: int, size: int, seed: int, *, held_out: bool = False) -> Batch:
        """Return batch `index` of an endless sequence that depends only on size and seed.

        Samples that are `held_out` are in no other batch.
        """
        ...

    def split_text(self) -> str:
        """Return a sentence on how many samples there are, and how many are held out. Call it after `prepare`."""
        ...

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """Decode to images [B, 3, P, P] in 0..1, float32 on the CPU; None without an autoencoder."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        """Encode prompts. Raises UserError without text encoders."""
        ...


def latent_batch(
    latents: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor, words_BL: Tensor | None = None
) -> Batch:
    """Make a batch from latents [B, channels, height, width], cut into 2 x 2 patches. Without `words_BL` nothing is padding."""
    texts = Texts(context, pooled, torch.ones(context.shape[:2], dtype=torch.bool) if words_BL is None else words_BL)
    batch = prompt_batch(texts, guidance, (8 * latents.shape[-1], 8 * latents.shape[-2]))
    batch.tokens_BTC = rearrange(
        latents.float(), "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH_LATENTS, q=PATCH_LATENTS
    )
    return batch


def prompt_batch(texts: Texts, guidance_B: Tensor, size: tuple[int, int]) -> Batch:
    """Make a batch without images, for images of `size`: width and height in pixels."""
    width, height = size[0] // PATCH_PIXELS, size[1] // PATCH_PIXELS
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return Batch(
        tokens_BTC=None,
        context_BLD=texts.context_BLD.float(),
        pooled_BV=texts.pooled_BV.float(),
        guidance_B=guidance_B.float(),
        image_ids_T3=ids.flatten(0, 1),
        text_ids_L3=torch.zeros(texts.context_BLD.shape[1], 3),
        words_BL=texts.words_BL,
    )


def tokens_to_latents(tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor:
    """Put tokens together to latents [B, channels, height, width], the reverse of `latent_batch`."""
    height, width = (int(image_ids_T3[:, axis].max()) + 1 for axis in (1, 2))
    return rearrange(
        tokens_BTC, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=PATCH_LATENTS, q=PATCH_LATENTS
    )


def draw_guidance(limits: tuple[float, float], index: int, size: int, seed: int) -> Tensor:
    """Draw the guidance [size] of batch `index`, uniform within the limits."""
    return torch.from_numpy(np.random.default_rng((seed, index, 1)).uniform(*limits, size)).float()


def check_fits(batch: Batch, dims: FluxDims) -> None:
    """Raise UserError unless the data have this FLUX's widths."""
    for what, tensor, expected in (
        ("image tokens", batch.tokens_BTC, dims.in_channels),
        ("context", batch.context_BLD, dims.context_size),
        ("pooled text", batch.pooled_BV, dims.vector_size),
    ):
        if tensor is not None and tensor.shape[-1] != expected:
            raise UserError(f"The data's {what} are {tensor.shape[-1]} wide; this teacher's are {expected}.")

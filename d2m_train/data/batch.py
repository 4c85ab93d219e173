"""What a FLUX is asked with in calibration and training, and what gives it: a batch, and a source of batches.

Shapes: B batch, T image tokens, C channels of a token, L text tokens, D context width, V pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from d2m_model.config import FluxDims

from .. import UserError

GUIDANCE = (1.5, 5.0)  # a guidance-distilled teacher is asked with values of this range


@dataclass(kw_only=True, slots=True)
class Batch:
    """What a FLUX is asked with, but for noise and timestep. Float32, on the CPU."""

    tokens_BTC: Tensor
    context_BLD: Tensor
    pooled_BV: Tensor
    guidance_B: Tensor
    image_ids_T3: Tensor
    text_ids_L3: Tensor
    words_BL: Tensor  # bool: False for padding, which calibration leaves out where it can


class DataSource(Protocol):
    """A source of samples. `name` stands in the file's provenance; `identity` changes when the data do."""

    name: str
    identity: str

    def batch(self, index: int, size: int, seed: int) -> Batch:
        """Number `index` of an endless sequence that depends on size and seed alone."""
        ...


def batch_of(
    latents: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor, words_BL: Tensor | None = None
) -> Batch:
    """From latents [B, channels, height, width], cut into FLUX's 2 x 2 patches. Without `words_BL` nothing is padding."""
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return Batch(
        tokens_BTC=rearrange(latents.float(), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        context_BLD=context.float(),
        pooled_BV=pooled.float(),
        guidance_B=guidance.float(),
        image_ids_T3=ids.flatten(0, 1),
        text_ids_L3=torch.zeros(context.shape[1], 3),
        words_BL=torch.ones(context.shape[:2], dtype=torch.bool) if words_BL is None else words_BL,
    )


def check_fits(batch: Batch, dims: FluxDims) -> None:
    """Raises UserError if the data are not of this FLUX's widths."""
    for what, found, expected in (
        ("image tokens", batch.tokens_BTC.shape[-1], dims.in_channels),
        ("context", batch.context_BLD.shape[-1], dims.context_size),
        ("pooled text", batch.pooled_BV.shape[-1], dims.vector_size),
    ):
        if found != expected:
            raise UserError(f"The data's {what} are {found} wide; this teacher's are {expected}.")

"""Noise levels, noise and noisy latents of a training batch (method.md, Distillation: timesteps).

Everything is drawn from the run's seed and the batch's number, so that a resumed run draws the same.

Shapes: B batch, T image tokens, C channels of a token.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2m_model.conversion.split import generator_for

from ..data.batch import Batch
from ..run_config import TimestepsSection
from .velocity import noised, velocity

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

# FLUX's: the shift grows with the logarithm of resolution, a line through these (tokens, mu).
SHORT, LONG = (256, 0.5), (4096, 1.15)


@dataclass(kw_only=True, slots=True)
class NoisyBatch:
    """A batch's inputs at their noise levels t in 0..1. `target_BTC` (noise - image) is None where there is no image."""

    tokens_BTC: Tensor
    t_B: Tensor
    target_BTC: Tensor | None


def time_shift(tokens: int, section: TimestepsSection) -> float:
    """mu of FLUX's time shift: the section's, or the one that FLUX uses at this resolution."""
    if section.shift != "resolution":
        return float(section.shift)
    slope = (LONG[1] - SHORT[1]) / (LONG[0] - SHORT[0])
    return SHORT[1] + slope * (tokens - SHORT[0])


def shifted(t: Tensor, mu: float) -> Tensor:
    """exp(mu) t / (1 + (exp(mu) - 1) t): towards noise for mu > 0."""
    return math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t)


def grid(steps: int, mu: float) -> Tensor:
    """[steps + 1] noise levels of the teacher's own inference, from 1 to 0."""
    return shifted(torch.linspace(1, 0, steps + 1), mu)


def noise_levels(count: int, tokens: int, section: TimestepsSection, generator: torch.Generator) -> Tensor:
    """t_B: logit-normal and shifted, or levels of the teacher's grid that it is asked at (all but the last, 0)."""
    mu = time_shift(tokens, section)
    if section.sampling == "teacher_grid":
        place_B = torch.randint(section.grid_steps, (count,), generator=generator)
        return grid(section.grid_steps, mu)[place_B]
    normal_B = section.mean + section.std * torch.randn(count, generator=generator)
    return shifted(normal_B.sigmoid(), mu)


def noisy_batch(
    batch: Batch, section: TimestepsSection, seed: int, index: int, teacher: FluxTransformer2DModel
) -> NoisyBatch:
    """The inputs of batch number `index`. With prompts alone they are points of the teacher's own trajectories.

    A trajectory is walked from pure noise to the drawn level of the teacher's grid, so such a batch costs the teacher as
    many passes as it walks steps, half of `grid_steps` on average; its samples share their level.
    """
    generator = generator_for(seed, f"noise {index}")
    count, tokens = len(batch.pooled_BV), len(batch.image_ids_T3)
    noise_BTC = torch.randn(count, tokens, channels_of(teacher), generator=generator)
    if batch.tokens_BTC is not None:
        t_B = noise_levels(count, tokens, section, generator)
        return NoisyBatch(
            tokens_BTC=noised(batch.tokens_BTC, noise_BTC, t_B), t_B=t_B, target_BTC=noise_BTC - batch.tokens_BTC
        )
    levels = grid(section.grid_steps, time_shift(tokens, section))
    walked = int(torch.randint(section.grid_steps, (), generator=generator))
    here_BTC = trajectory(teacher, batch, noise_BTC, levels[: walked + 1])
    return NoisyBatch(tokens_BTC=here_BTC, t_B=levels[walked].expand(count), target_BTC=None)


def channels_of(teacher: FluxTransformer2DModel) -> int:
    """Of the noised part of a token; an inpainting FLUX takes more, of its conditions."""
    channels: int = teacher.out_channels
    return channels


@torch.no_grad()
def trajectory(
    model: FluxTransformer2DModel, batch: Batch, noise_BTC: Tensor, levels: Tensor, guided: bool | None = None
) -> Tensor:
    """Euler's way from levels[0] to levels[-1] of the model's own velocity: float32 [B, T, C].

    `guided`: whether the model takes guidance; None asks its configuration, which a model wrapped for several ranks hides.
    """
    here_BTC = noise_BTC
    guided = model.config.guidance_embeds if guided is None else guided
    for now, following in itertools.pairwise(levels.tolist()):
        t_B = torch.full((len(noise_BTC),), now)
        flow_BTC = velocity(model, batch, here_BTC, t_B, batch.guidance_B, guided)
        here_BTC = here_BTC + (following - now) * flow_BTC.float().to(here_BTC.device)
    return here_BTC

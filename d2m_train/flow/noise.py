"""Noise levels, noise and noisy latents of a training batch.

Everything is drawn from the run's seed and the batch's number, so that a resumed run draws the same.

Shapes: B batch, T image tokens, C channels of a token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2m_model.conversion.split import generator_for

from ..data.batch import Batch
from ..data.copying import copy_to_device
from ..run_config import TimestepsSection
from .velocity import noised, velocity

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

# FLUX's time shift mu is a line through these points (image tokens, mu).
_SHORT, _LONG = (256, 0.5), (4096, 1.15)


@dataclass(kw_only=True, slots=True)
class NoisyBatch:
    """A batch's inputs at their noise levels t in 0..1. `target_BTC` (noise - image) is None where there is no image."""

    tokens_BTC: Tensor
    t_B: Tensor
    target_BTC: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> NoisyBatch:
        """Return the inputs changed."""
        target_BTC = None if self.target_BTC is None else change(self.target_BTC)
        return NoisyBatch(tokens_BTC=change(self.tokens_BTC), t_B=change(self.t_B), target_BTC=target_BTC)


def time_shift(tokens: int, section: TimestepsSection) -> float:
    """mu of FLUX's time shift: the section's own, or FLUX's at this number of image tokens."""
    if section.shift != "resolution":
        return float(section.shift)
    slope = (_LONG[1] - _SHORT[1]) / (_LONG[0] - _SHORT[0])
    return _SHORT[1] + slope * (tokens - _SHORT[0])


def shifted(t: Tensor, mu: float) -> Tensor:
    """Shift noise levels: exp(mu) t / (1 + (exp(mu) - 1) t), towards noise for mu > 0."""
    return math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t)


def grid(steps: int, mu: float) -> Tensor:
    """[steps + 1] noise levels of the teacher's own inference, from 1 to 0."""
    return shifted(torch.linspace(1, 0, steps + 1), mu)


def noise_levels(count: int, tokens: int, section: TimestepsSection, generator: torch.Generator) -> Tensor:
    """Draw t_B: logit-normal and shifted, or levels of the teacher's grid except its last, 0."""
    mu = time_shift(tokens, section)
    if section.sampling == "teacher_grid":
        index_B = torch.randint(section.grid_steps, (count,), generator=generator)
        return grid(section.grid_steps, mu)[index_B]
    normal_B = section.mean + section.std * torch.randn(count, generator=generator)
    return shifted(normal_B.sigmoid(), mu)


def noisy_batch(
    batch: Batch, section: TimestepsSection, seed: int, index: int, teacher: FluxTransformer2DModel
) -> NoisyBatch:
    """Noisy inputs of batch `index`; for prompts without images, points of the teacher's own trajectories.

    Such a trajectory goes from pure noise to a drawn level of the teacher's grid. It costs the teacher one pass per step,
    half of `grid_steps` on average; all samples of the batch share the level.
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
    noisy_BTC = trajectory(teacher, batch, copy_to_device(noise_BTC, batch.pooled_BV.device), levels[: walked + 1])
    return NoisyBatch(tokens_BTC=noisy_BTC, t_B=levels[walked].expand(count), target_BTC=None)


def channels_of(teacher: FluxTransformer2DModel) -> int:
    """Channels of the noised part of a token; an inpainting FLUX takes further channels for its conditions."""
    channels: int = teacher.out_channels
    return channels


@torch.no_grad()
def trajectory(
    model: FluxTransformer2DModel, batch: Batch, noise_BTC: Tensor, levels: Tensor, guided: bool | None = None
) -> Tensor:
    """Follow the model's own velocity from levels[0] to levels[-1] by Euler's method: float32 [B, T, C].

    `guided`: whether the model takes guidance. None reads its configuration, which a wrapped model does not show.
    """
    noisy_BTC = noise_BTC
    guided = model.config.guidance_embeds if guided is None else guided
    for now, following in itertools.pairwise(levels.tolist()):
        t_B = torch.full((len(noise_BTC),), now, device=noise_BTC.device)
        flow_BTC = velocity(model, batch, noisy_BTC, t_B, batch.guidance_B, guided)
        noisy_BTC = noisy_BTC + (following - now) * flow_BTC.float().to(noisy_BTC.device)
    return noisy_BTC

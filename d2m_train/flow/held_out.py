"""Held-out batches: noisy inputs at fixed noise levels, with the teacher's velocity, the same at every validation.

They depend on the seed and the data alone, not on the number of ranks: every rank has all of them.

Shapes: B batch, T image tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2m_model.conversion.split import generator_for

from ..data.batch import Batch, DataSource
from ..run_config import EyesSection, TimestepsSection
from .noise import channels_of, grid, time_shift, trajectory
from .velocity import noised, velocity

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_SEED_OFFSET = 1_000_003


@dataclass(kw_only=True, slots=True)
class HeldOutBatch:
    """A batch at its noise levels, with the teacher's velocity. `target_BTC` (noise - image) is None for prompts."""

    stratum: str
    batch: Batch
    noisy_BTC: Tensor
    t_B: Tensor
    teacher_BTC: Tensor
    target_BTC: Tensor | None


def held_out_seed(seed: int) -> int:
    """The seed of held-out samples: where samples are generated, others than the run trains on."""
    return seed + _SEED_OFFSET


def held_out_batches(
    data: DataSource,
    teacher: FluxTransformer2DModel,
    section: EyesSection,
    timesteps: TimestepsSection,
    *,
    batch_size: int,
    seed: int,
) -> list[HeldOutBatch]:
    """The section's `validation_batches`, each at `validation_timesteps` strata of noise levels.

    The levels of a stratum are spread over its width. A few-step teacher (timesteps.sampling `teacher_grid`) and prompts
    without images use levels of the teacher's own grid instead.
    """
    guided = teacher.config.guidance_embeds
    batches, strata = section.validation_batches, section.validation_timesteps
    # Each stratum has as many levels as there are samples, each level in its own part of the stratum.
    spread = torch.randperm(batches * batch_size, generator=generator_for(seed, "validation levels")) + 0.5
    parts = (spread / (batches * batch_size)).split(batch_size)
    held_out: list[HeldOutBatch] = []
    for index, part_B in enumerate(parts):
        batch = data.batch(index, batch_size, held_out_seed(seed), held_out=True)
        generator = generator_for(seed, f"validation {index}")
        noise_BTC = torch.randn(len(part_B), len(batch.image_ids_T3), channels_of(teacher), generator=generator)
        for stratum, t_B, noisy_BTC in _noisy_inputs(batch, noise_BTC, part_B, strata, timesteps, teacher):
            with torch.no_grad():
                teacher_BTC = velocity(teacher, batch, noisy_BTC, t_B, batch.guidance_B, guided)
            held_out.append(
                HeldOutBatch(
                    stratum=stratum,
                    batch=batch,
                    noisy_BTC=noisy_BTC,
                    t_B=t_B,
                    teacher_BTC=teacher_BTC.float().cpu(),
                    target_BTC=None if batch.tokens_BTC is None else noise_BTC - batch.tokens_BTC,
                )
            )
    return held_out


def _noisy_inputs(
    batch: Batch,
    noise_BTC: Tensor,
    part_B: Tensor,
    strata: int,
    timesteps: TimestepsSection,
    teacher: FluxTransformer2DModel,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, t_B, noisy_BTC) per stratum, from noise to image. `part_B` is each sample's place in a stratum, 0..1."""
    count = len(part_B)
    if batch.tokens_BTC is not None and timesteps.sampling != "teacher_grid":
        for stratum in reversed(range(strata)):
            t_B = (stratum + part_B) / strata
            yield _stratum_name((stratum + 0.5) / strata), t_B, noised(batch.tokens_BTC, noise_BTC, t_B)
        return
    levels = grid(timesteps.grid_steps, time_shift(noise_BTC.shape[1], timesteps))
    indices = torch.linspace(0, timesteps.grid_steps - 1, strata).round().long().unique().tolist()
    noisy_BTC, walked = noise_BTC, 0
    for index in indices:
        t_B = levels[index].expand(count)
        if batch.tokens_BTC is not None:
            noisy_BTC = noised(batch.tokens_BTC, noise_BTC, t_B)
        else:
            noisy_BTC = trajectory(teacher, batch, noisy_BTC, levels[walked : index + 1]).cpu()
            walked = index
        yield _stratum_name(float(levels[index])), t_B, noisy_BTC


def _stratum_name(level: float) -> str:
    return f"t{level:.2g}"

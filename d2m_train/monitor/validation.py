"""Validation: how far the student is from its teacher at every noise level, on the same questions every time.

The teacher answers once, when the questions are made; later only the student is asked. Questions depend on the seed and
the data alone, not on the number of ranks, each of which asks them all.

Shapes: B batch, T image tokens, C channels of a token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2m_model.conversion.split import generator_for

from ..data.batch import Batch, DataSource
from ..distillation.losses import output_loss
from ..flow.noise import channels_of, grid, shift_of, trajectory
from ..flow.velocity import noised, velocity
from ..run_config import EyesSection, TimestepsSection

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

SEED_APART = 1_000_003  # from the run's seed: what the run trains on comes in another order, or is another picture


@dataclass(kw_only=True, slots=True)
class Question:
    """A batch at its noise levels, and the teacher's velocity there. `target_BTC` (noise - image) is None for prompts."""

    stratum: str
    batch: Batch
    noisy_BTC: Tensor
    t_B: Tensor
    teacher_BTC: Tensor
    target_BTC: Tensor | None


class Validation:
    """`validation/loss` (Eq. 7 on held-out batches), `validation/t0.1` … of one stratum, `validation/data` against data.

    Noise levels of a stratum are spread over it; a few-step teacher (timesteps.sampling `teacher_grid`), and prompts
    without images, are asked at levels of the teacher's own grid.
    """

    def __init__(
        self,
        data: DataSource,
        teacher: FluxTransformer2DModel,
        section: EyesSection,
        timesteps: TimestepsSection,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.guided: bool = teacher.config.guidance_embeds
        self.questions: list[Question] = []
        batches, strata = section.validation_batches, section.validation_timesteps
        # Of every stratum as many levels as there are samples, each in its own part of it.
        spread = torch.randperm(batches * batch_size, generator=generator_for(seed, "validation levels")) + 0.5
        parts = (spread / (batches * batch_size)).split(batch_size)
        for index, part_B in enumerate(parts):
            batch = data.batch(index, batch_size, seed + SEED_APART)
            generator = generator_for(seed, f"validation {index}")
            noise_BTC = torch.randn(len(part_B), len(batch.image_ids_T3), channels_of(teacher), generator=generator)
            for stratum, t_B, noisy_BTC in _noisy(batch, noise_BTC, part_B, strata, timesteps, teacher):
                with torch.no_grad():
                    answer_BTC = velocity(teacher, batch, noisy_BTC, t_B, batch.guidance_B, self.guided)
                self.questions.append(
                    Question(
                        stratum=stratum,
                        batch=batch,
                        noisy_BTC=noisy_BTC,
                        t_B=t_B,
                        teacher_BTC=answer_BTC.float().cpu(),
                        target_BTC=None if batch.tokens_BTC is None else noise_BTC - batch.tokens_BTC,
                    )
                )

    @torch.no_grad()
    def __call__(self, student: nn.Module, every_block: bool = False) -> dict[str, float]:
        """Ask the student, in eval mode; see `evaluating`. Under autocast, where there is one."""
        losses: dict[str, list[float]] = defaultdict(list)
        with evaluating(student, every_block):
            for question in self.questions:
                batch, t_B = question.batch, question.t_B
                found_BTC = velocity(student, batch, question.noisy_BTC, t_B, batch.guidance_B, self.guided)
                found_BTC = found_BTC.float().cpu()
                loss = float(output_loss(question.teacher_BTC, found_BTC))
                losses["validation/loss"].append(loss)
                losses[f"validation/{question.stratum}"].append(loss)
                if question.target_BTC is not None:
                    losses["validation/data"].append(float(output_loss(question.target_BTC, found_BTC)))
        return {name: sum(values) / len(values) for name, values in losses.items()}


@contextmanager
def evaluating(model: nn.Module, every_block: bool = False) -> Iterator[None]:
    """Every module in eval mode during the `with`, and each in its own again after it.

    `every_block`: blocks of a group all run, and are masked where they are not chosen. A sharded run needs that: were a
    tie to fall otherwise on one rank, the ranks would wait for each other for ever.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if every_block:
        for module in modes:
            module.training = getattr(module, "member", None) is not None
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _noisy(
    batch: Batch,
    noise_BTC: Tensor,
    part_B: Tensor,
    strata: int,
    timesteps: TimestepsSection,
    teacher: FluxTransformer2DModel,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, t_B, noisy_BTC) of every stratum, from noise to image. `part_B`: where in a stratum each sample lies, 0..1."""
    count = len(part_B)
    if batch.tokens_BTC is not None and timesteps.sampling != "teacher_grid":
        for stratum in reversed(range(strata)):
            t_B = (stratum + part_B) / strata
            yield _name((stratum + 0.5) / strata), t_B, noised(batch.tokens_BTC, noise_BTC, t_B)
        return
    levels = grid(timesteps.grid_steps, shift_of(noise_BTC.shape[1], timesteps))
    asked = torch.linspace(0, timesteps.grid_steps - 1, strata).round().long().unique().tolist()
    here_BTC, walked = noise_BTC, 0
    for place in asked:
        t_B = levels[place].expand(count)
        if batch.tokens_BTC is not None:
            here_BTC = noised(batch.tokens_BTC, noise_BTC, t_B)
        else:
            here_BTC = trajectory(teacher, batch, here_BTC, levels[walked : place + 1]).cpu()
            walked = place
        yield _name(float(levels[place])), t_B, here_BTC


def _name(level: float) -> str:
    return f"t{level:.2g}"

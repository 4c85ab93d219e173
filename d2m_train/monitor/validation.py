"""The validation loss: the student's distance from its teacher at every noise level, on the same held-out batches.

The teacher's velocities are computed once, when the batches are made; later only the student runs.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data.batch import DataSource
from ..distillation.losses import output_loss
from ..flow.held_out import HeldOutBatch, held_out_batches
from ..flow.velocity import evaluating, velocity
from ..run_config import EyesSection, TimestepsSection

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

VALIDATION_LOSS = "validation/loss"


class Validation:
    """Measures `validation/loss` (Eq. 7 on held-out batches), `validation/t0.1` … (one stratum of noise levels each) and
    `validation/data` (against the data instead of the teacher)."""

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
        self.batches: list[HeldOutBatch] = held_out_batches(
            data, teacher, section, timesteps, batch_size=batch_size, seed=seed
        )

    @torch.no_grad()
    def __call__(self, student: nn.Module, every_block: bool = False) -> dict[str, float]:
        """Run the student in eval mode (see `evaluating`), under autocast where there is one. Return losses by name."""
        losses: dict[str, list[float]] = defaultdict(list)
        with evaluating(student, every_block):
            for held_out in self.batches:
                batch, t_B = held_out.batch, held_out.t_B
                student_BTC = velocity(student, batch, held_out.noisy_BTC, t_B, batch.guidance_B, self.guided)
                student_BTC = student_BTC.float().cpu()
                loss = float(output_loss(held_out.teacher_BTC, student_BTC))
                losses[VALIDATION_LOSS].append(loss)
                losses[f"validation/{held_out.stratum}"].append(loss)
                if held_out.target_BTC is not None:
                    losses["validation/data"].append(float(output_loss(held_out.target_BTC, student_BTC)))
        return {name: sum(values) / len(values) for name, values in losses.items()}

"""One microbatch of distillation: forward passes of teacher and student, and every loss (Sec. 3.2).

Shapes: B batch, T image tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data.batch import Batch
from ..flow.noise import NoisyBatch
from ..flow.velocity import velocity
from .features import block_outputs, stream_names
from .losses import StepLosses, distillation_losses
from .router_losses import RouterTraining

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel


@dataclass(kw_only=True, slots=True)
class Distillation(RouterTraining):
    """A stage's comparison of a student with its teacher.

    `student` runs the forward pass (wrapped, where there are several ranks); `core` is the model within it.
    """

    core: FluxMoETransformer2DModel
    teacher: FluxTransformer2DModel
    student: Any

    def losses(self, batch: Batch, noisy: NoisyBatch) -> StepLosses:
        """Losses of a batch at its noise. Only the routers' records change."""
        self.set_pools(batch)
        return self.compare(batch, noisy)

    def compare(self, batch: Batch, noisy: NoisyBatch) -> StepLosses:
        """The same for a student whose capacity routers have their pools."""
        guided = self.teacher.config.guidance_embeds
        inputs = (batch, noisy.tokens_BTC, noisy.t_B, batch.guidance_B)
        with torch.no_grad(), block_outputs(self.teacher, [f.teacher for f in self.plan.features]) as teacher_outputs:
            teacher_BTC = velocity(self.teacher, *inputs, guided)
        with block_outputs(self.core, [f.student for f in self.plan.features]) as student_outputs:
            student_BTC = velocity(self.student, *inputs, guided)
        device = student_BTC.device
        targets = {own: teacher_outputs[other].to(device) for own, other in self._pairs()}
        output, features = distillation_losses(
            teacher_BTC.to(device), student_BTC, targets, student_outputs, outliers=self.run.losses.outliers
        )
        total = output + self.run.losses.feature * features
        return self.step_losses(total, {"output": output, "features": features}, batch, targets)

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for feature in self.plan.features:
            yield from zip(stream_names(feature.student), stream_names(feature.teacher), strict=True)

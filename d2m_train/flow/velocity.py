"""The velocity of a FLUX in diffusers, teacher or student.

Shapes: B batch, T image tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.copying import copy_to_device

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


def velocity(
    model: FluxTransformer2DModel, batch: Batch, noisy_BTC: Tensor, t_B: Tensor, guidance_B: Tensor, embedded: bool
) -> Tensor:
    """Predict noise - image for `noisy_BTC` at noise levels t in 0..1: [B, T, C] in the model's dtype.

    `embedded`: whether the model takes guidance. Inputs are moved to the model's device and dtype.
    """
    parameter = next(model.parameters())
    place = (parameter.device, parameter.dtype)
    velocity_BTC: Tensor = model(
        hidden_states=copy_to_device(noisy_BTC, *place),
        encoder_hidden_states=copy_to_device(batch.context_BLD, *place),
        pooled_projections=copy_to_device(batch.pooled_BV, *place),
        timestep=copy_to_device(t_B, *place),
        guidance=copy_to_device(guidance_B, *place) if embedded else None,
        img_ids=copy_to_device(batch.image_ids_T3, parameter.device),
        txt_ids=copy_to_device(batch.text_ids_L3, parameter.device),
        return_dict=False,
    )[0]
    return velocity_BTC


def noised(tokens_BTC: Tensor, noise_BTC: Tensor, t_B: Tensor) -> Tensor:
    """The rectified flow's point between image (t = 0) and noise (t = 1)."""
    return torch.lerp(tokens_BTC, noise_BTC, t_B[:, None, None].to(tokens_BTC))


@contextmanager
def evaluating(model: nn.Module, every_block: bool = False) -> Iterator[None]:
    """Put every module into eval mode during the `with`, and each back into its own mode after it.

    `every_block`: all blocks of a group run, and are masked where they are not chosen. A sharded run needs that: if ranks
    chose differently in a tie, they would wait for each other forever.
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

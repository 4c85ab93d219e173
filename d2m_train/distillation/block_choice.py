"""Errors of a group's blocks when each runs alone: block routers and the blocks that were not chosen learn from them.

Shapes: B batch, T image and L text tokens, H hidden size, M blocks of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2m_model.config import BlockGroup
from d2m_model.mob import BlockRouting

from .features import stream_names

if TYPE_CHECKING:
    from d2m_model.hosts.diffusers.modules import GroupOutputs


def block_errors(group: BlockGroup, outputs: GroupOutputs, features: Mapping[str, Tensor]) -> Tensor:
    """Return each sample's squared error after each block alone, relative to the mean error if no block ran: float32 [B, M].

    `features` has the teacher's output of the group's last block, by the names of `stream_names`. Both streams of a double
    block count the same; those of a single block are one feature.
    """
    last = group.members[-1]
    target = [features[name].float() for name in stream_names(last.name)]
    nothing = [square_B.mean() for square_B in _squares(outputs.given, target)]
    tiny = torch.finfo(torch.float32).tiny
    errors = []
    for streams in outputs.after:
        parts = zip(_squares(streams, target), nothing, strict=True)
        errors.append(torch.stack([square_B / mean.clamp_min(tiny) for square_B, mean in parts]).mean(dim=0))
    return torch.stack(errors, dim=1)


def _squares(streams: Sequence[Tensor], target: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean squared error [B] of each feature; `streams` are (text, image)."""
    text_BLH, image_BTH = streams
    features = (image_BTH, text_BLH) if len(target) == 2 else (torch.cat([text_BLH, image_BTH], dim=1),)
    return [(own.float() - other).square().mean(dim=(1, 2)) for own, other in zip(features, target, strict=True)]


def idle_loss(routing: BlockRouting, errors_BM: Tensor) -> Tensor:
    """Return the mean error of the blocks that were not chosen, a scalar: with it, all blocks learn from all samples."""
    idle_BM = ~routing.chosen_BM
    return (errors_BM * idle_BM).sum() / idle_BM.sum().clamp_min(1)

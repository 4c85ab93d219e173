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


def image_errors(group: BlockGroup, outputs: GroupOutputs, features: Mapping[str, Tensor]) -> Tensor:
    """Return each sample's squared error of the image tokens after each block alone: float32 [B, M].

    It is relative to the mean error if no block ran. `features` has the teacher's output of the group's last block, by the
    names of `stream_names`. Text tokens matter only where later blocks read them, as in conversion/block_routers.py.
    """
    text_BLH, _ = outputs.given
    target_BTH = features[stream_names(group.members[-1].name)[0]]
    if group.kind == "single":  # both streams in one, which begins with the text
        target_BTH = target_BTH[:, text_BLH.shape[1] :]
    return _relative([outputs.given[1]], [[image_BTH] for _, image_BTH in outputs.after], [target_BTH])


def idle_loss(
    group: BlockGroup, routing: BlockRouting, outputs: GroupOutputs, features: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean error of the blocks that were not chosen, a scalar: with it, all blocks learn from all samples.

    Both streams of a double block count the same; those of a single block are one feature, as in Eq. 8.
    """
    target = [features[name] for name in stream_names(group.members[-1].name)]

    def compared(streams: Sequence[Tensor]) -> list[Tensor]:
        text_BLH, image_BTH = streams
        return [image_BTH, text_BLH] if group.kind == "double" else [torch.cat([text_BLH, image_BTH], dim=1)]

    errors_BM = _relative(compared(outputs.given), [compared(streams) for streams in outputs.after], target)
    idle_BM = ~routing.chosen_BM
    return (errors_BM * idle_BM).sum() / idle_BM.sum().clamp_min(1)


def _relative(given: Sequence[Tensor], after: Sequence[Sequence[Tensor]], target: Sequence[Tensor]) -> Tensor:
    """Return the mean over features of each sample's squared error after each block, by that of `given`: float32 [B, M]."""
    tiny = torch.finfo(torch.float32).tiny
    unit = [_squares(*pair).mean().clamp_min(tiny) for pair in zip(given, target, strict=True)]
    errors = [
        torch.stack([_squares(own, other) / one for own, other, one in zip(streams, target, unit, strict=True)])
        for streams in after
    ]
    return torch.stack([parts.mean(dim=0) for parts in errors], dim=1)


def _squares(own_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Return each sample's mean squared error, float32 [B]."""
    return (own_BTH.float() - target_BTH.float()).square().mean(dim=(1, 2))

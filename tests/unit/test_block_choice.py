"""Errors of blocks that run alone, and the loss of blocks that were not chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from d2m_model.blocks import BlockKind
from d2m_model.config import BlockGroup
from d2m_model.hosts.diffusers.modules import GroupOutputs
from d2m_model.mob import BlockRouting
from d2m_train.distillation.block_choice import block_errors, idle_loss


def streams(seed: int) -> tuple[Tensor, Tensor]:
    """Text [2, 3, 4] and image [2, 5, 4], the text much larger, as in FLUX."""
    generator = torch.Generator().manual_seed(seed)
    return 30 * torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)


def squares(own: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], kind: BlockKind) -> list[list[float]]:
    """For each feature, the mean squared error of each of the two samples: literally."""
    pairs = list(zip(own, target, strict=True))
    if kind == "single":
        pairs = [(torch.cat(own, dim=1), torch.cat(target, dim=1))]
    return [[float((a[b] - c[b]).square().mean()) for b in range(2)] for a, c in pairs]


@pytest.mark.parametrize("kind", ["double", "single"])
def test_errors_are_relative_to_those_of_no_block_and_streams_count_the_same(kind: BlockKind) -> None:
    group = BlockGroup(kind=kind, first=1, blocks=3, active=1, selection="topk")
    given, target = streams(0), streams(1)
    after = [streams(seed) for seed in (2, 3, 4)]
    text, image = target
    named = {"double_blocks.3.img": image, "double_blocks.3.txt": text}
    if kind == "single":
        named = {"single_blocks.3": torch.cat([text, image], dim=1)}
    found = block_errors(group, GroupOutputs(given=given, after=list(after)), named)
    nothing = [sum(feature) / 2 for feature in squares(given, target, kind)]
    expected = [
        [
            sum(feature[b] / mean for feature, mean in zip(squares(own, target, kind), nothing, strict=True))
            / len(nothing)
            for own in after
        ]
        for b in range(2)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    perfect = block_errors(group, GroupOutputs(given=given, after=[given, target]), named)
    assert perfect.mean(dim=0).tolist() == pytest.approx([1, 0])


def test_idle_loss_is_the_mean_error_of_the_blocks_that_were_not_chosen() -> None:
    chosen = torch.tensor([[True, False, False], [False, False, True]])
    errors = torch.tensor([[9.0, 1, 2], [3, 4, 9]], requires_grad=True)
    loss = idle_loss(BlockRouting(chosen_BM=chosen, logits_BM=torch.zeros(2, 3), active=1), errors)
    assert loss == 2.5
    loss.backward()
    assert torch.equal(errors.grad, ~chosen / 4)  # type: ignore[arg-type]

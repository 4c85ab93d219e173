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
from d2m_train.distillation.block_choice import idle_loss, image_errors


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


@pytest.fixture(params=["double", "single"])
def group(request: pytest.FixtureRequest) -> BlockGroup:
    return BlockGroup(kind=request.param, first=1, blocks=3, active=1, selection="topk")


def named(group: BlockGroup, target: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    text, image = target
    if group.kind == "single":
        return {"single_blocks.3": torch.cat([text, image], dim=1)}
    return {"double_blocks.3.img": image, "double_blocks.3.txt": text}


GIVEN, TARGET, AFTER = streams(0), streams(1), [streams(seed) for seed in (2, 3, 4)]
OUTPUTS = GroupOutputs(given=GIVEN, after=list(AFTER))


def test_blocks_are_compared_by_the_image_relative_to_no_block(group: BlockGroup) -> None:
    found = image_errors(group, OUTPUTS, named(group, TARGET))
    nothing = (GIVEN[1] - TARGET[1]).square().mean()
    expected = [[float((own[1][b] - TARGET[1][b]).square().mean() / nothing) for own in AFTER] for b in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected))
    exact = image_errors(group, GroupOutputs(given=GIVEN, after=[GIVEN, TARGET]), named(group, TARGET))
    assert exact.mean(dim=0).tolist() == pytest.approx([1, 0])


def test_idle_loss_is_the_mean_error_of_the_blocks_that_were_not_chosen(group: BlockGroup) -> None:
    chosen = torch.tensor([[True, False, False], [False, False, True]])
    routing = BlockRouting(chosen_BM=chosen, logits_BM=torch.zeros(2, 3), active=1)
    nothing = [sum(feature) / 2 for feature in squares(GIVEN, TARGET, group.kind)]
    errors = []
    for block, sample in ((1, 0), (2, 0), (0, 1), (1, 1)):
        parts = zip(squares(AFTER[block], TARGET, group.kind), nothing, strict=True)
        errors.append(sum(feature[sample] / mean for feature, mean in parts) / len(nothing))
    found = idle_loss(group, routing, OUTPUTS, named(group, TARGET))
    assert float(found) == pytest.approx(sum(errors) / 4, rel=1e-5)

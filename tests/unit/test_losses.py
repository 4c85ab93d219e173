"""The distillation losses against literal float64 transcriptions of Eq. 7-10, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2m_train.distillation.losses import (
    balance_loss,
    distillation_losses,
    feature_losses,
    feature_weights,
    output_loss,
)

NAMES = ("double_blocks.0", "single_blocks.0", "single_blocks.1")


def features(seed: int, requires_grad: bool = False) -> dict[str, Tensor]:
    """Return features of very different scales, like those of a FLUX."""
    generator = torch.Generator().manual_seed(seed)
    scales = dict(zip(NAMES, (0.1, 3.0, 200.0), strict=True))
    return {
        name: (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) * scale).requires_grad_(requires_grad)
        for name, scale in scales.items()
    }


def outputs(seed: int) -> Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_total(
    teacher_output: Tensor,
    student_output: Tensor,
    teacher: dict[str, Tensor],
    student: dict[str, Tensor],
    balance: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 10 as it stands, the weights of Eq. 9 as plain numbers."""
    distill = ((teacher_output - student_output) ** 2).sum() / teacher_output.numel()
    per_layer = [((teacher[name] - student[name]) ** 2).sum() / teacher[name].numel() for name in NAMES]
    norms = [math.sqrt(float((teacher[name] ** 2).sum())) for name in NAMES]
    weights = [
        float(distill.detach()) / float(per_layer[layer].detach()) * sum(norms) / (len(NAMES) * norms[layer])
        for layer in range(len(NAMES))
    ]
    feature = sum(weight * loss for weight, loss in zip(weights, per_layer, strict=True))
    return distill + 1.0 * feature + 0.01 * balance, dict(zip(NAMES, weights, strict=True))


def test_the_total_and_its_gradients_are_those_of_the_equations() -> None:
    teacher, mine, theirs = features(0), features(1, True), features(1, True)
    output, my_output, their_output = outputs(2), outputs(3).requires_grad_(), outputs(3).requires_grad_()
    balance = torch.tensor(1.7, dtype=torch.float64)
    expected, weights = literal_total(output, their_output, teacher, theirs, balance)
    distill, feature = distillation_losses(output, my_output, teacher, mine)
    found = distill + 1.0 * feature + 0.01 * balance
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, weight in feature_weights(distill, feature_losses(teacher, mine), teacher).items():
        assert float(weight) == pytest.approx(weights[name], rel=1e-5)
        assert not weight.requires_grad
    found.backward()
    expected.backward()
    for mine_, theirs_ in ((my_output, their_output), *((mine[name], theirs[name]) for name in NAMES)):
        torch.testing.assert_close(mine_.grad, theirs_.grad, rtol=1e-5, atol=1e-10)


def test_every_layer_weighs_as_the_output_does_whatever_its_scale() -> None:
    """This is the purpose of Eq. 9: the terms differ only by the teacher's norms."""
    output, losses = output_loss(outputs(2), outputs(3)), feature_losses(features(0), features(1))
    weights = feature_weights(output, losses, features(0))
    for name in NAMES:
        term = float(weights[name] * losses[name] / output)
        norms = {other: float(features(0)[other].norm()) for other in NAMES}
        assert term == pytest.approx(sum(norms.values()) / 3 / norms[name], rel=1e-5)


def test_a_layer_that_agrees_exactly_gives_no_nan_and_no_gradient() -> None:
    teacher, student = features(0), features(1, True)
    student[NAMES[0]] = teacher[NAMES[0]].clone().requires_grad_()
    student_output = outputs(3).requires_grad_()
    total = sum(distillation_losses(outputs(2), student_output, teacher, student))
    assert isinstance(total, Tensor)
    total.backward()
    assert total.isfinite()
    assert student[NAMES[0]].grad is not None
    assert student[NAMES[0]].grad.abs().max() == 0
    assert student[NAMES[1]].grad is not None
    assert student[NAMES[1]].grad.abs().max() > 0


def test_a_student_that_is_the_teacher_has_no_loss() -> None:
    assert distillation_losses(outputs(2), outputs(2), features(0), features(0)) == (0, 0)


def test_bfloat16_features_are_compared_in_float32() -> None:
    teacher = {"a": torch.full((1000,), 100.0, dtype=torch.bfloat16)}
    student = {"a": torch.full((1000,), 100.5, dtype=torch.bfloat16)}
    assert float(feature_losses(teacher, student)["a"]) == pytest.approx(0.25)
    assert output_loss(teacher["a"], student["a"]).dtype == torch.float32


def test_outliers_of_the_teacher_are_left_out_on_request() -> None:
    teacher = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    teacher[5] = 1e4
    student = torch.zeros_like(teacher)
    assert feature_losses({"a": teacher}, {"a": student})["a"] > 1000
    assert float(feature_losses({"a": teacher}, {"a": student}, outliers=10)["a"]) == pytest.approx(1, rel=0.1)


def test_features_of_one_model_only_are_refused() -> None:
    with pytest.raises(ValueError, match=r"single_blocks\.1 are of one model only"):
        feature_losses(features(0), {name: features(1)[name] for name in NAMES[:2]})


# Balance


def literal_balance(probabilities: Tensor, experts: Tensor, kept: Tensor) -> Tensor:
    total, sequences = torch.zeros((), dtype=torch.float64), 0
    for b in range(len(probabilities)):
        tokens = [t for t in range(probabilities.shape[1]) if kept[b, t]]
        if not tokens:
            continue
        sequences += 1
        n, k, count = probabilities.shape[2], experts.shape[2], len(tokens)
        for i in range(n):
            chosen = sum(int(i in experts[b, t].tolist()) for t in tokens)
            total = total + n / (count * k) * chosen * sum(probabilities[b, t, i] for t in tokens) / count
    return total / max(1, sequences)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("padding", [0.0, 0.4, 1.0])
def test_balance_is_gshards_on_the_tokens_that_count(top_k: int, padding: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    kept = torch.rand(3, 7, generator=generator) >= padding
    experts = logits.topk(top_k, -1).indices
    found = balance_loss(mine.softmax(-1), experts, kept)
    expected = literal_balance(theirs.softmax(-1), experts, kept)
    torch.testing.assert_close(found, expected)
    found.backward()
    if expected.requires_grad:
        expected.backward()
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_balance_is_one_when_balanced_and_largest_when_collapsed() -> None:
    even = torch.full((1, 12, 12), 1 / 12)
    experts = torch.stack([torch.arange(12), (torch.arange(12) + 1) % 12], -1)[None]
    assert float(balance_loss(even, experts)) == pytest.approx(1)
    collapsed = torch.zeros(1, 12, 12)
    collapsed[..., :2] = 0.5
    assert float(balance_loss(collapsed, torch.tensor([0, 1]).expand(1, 12, 2))) == pytest.approx(6)


def test_no_routed_experts_no_balance() -> None:
    assert balance_loss(torch.full((1, 3, 4), 0.25), torch.zeros(1, 3, 0, dtype=torch.int64)) == 0

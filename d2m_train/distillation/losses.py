"""The distillation losses (Sec. 3.2, Eq. 7-10) and the load-balancing loss: pure functions of the models' outputs.

Shapes: B samples, T tokens of a sample, E experts, K top_k; a feature is any tensor, the same in teacher and student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class StepLosses:
    """Scalars of one microbatch: `total` with its graph, and `parts` detached, for the log."""

    total: Tensor
    parts: dict[str, Tensor]


def output_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Eq. 7: the mean squared error of the velocity, in float32."""
    return F.mse_loss(student.float(), teacher.float())


def feature_losses(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], outliers: float | None = None
) -> dict[str, Tensor]:
    """The unweighted terms of Eq. 8: the mean squared error of each feature, in float32.

    `outliers`: leave out elements of the teacher's feature more than this many standard deviations from its mean (FLUX
    has a few enormous ones); None keeps all. Raises ValueError for features that only one of the two models has.
    """
    if teacher.keys() != student.keys():
        missing = sorted(teacher.keys() ^ student.keys())
        raise ValueError(f"Features {', '.join(missing)} are of one model only; expected the same of both.")
    losses = {}
    for name, target in teacher.items():
        square = (student[name].float() - target.float()).square()
        losses[name] = square.mean() if outliers is None else _masked_mean(square, _within(target, outliers))
    return losses


def _within(feature: Tensor, outliers: float) -> Tensor:
    feature = feature.float()
    return (feature - feature.mean()).abs() <= outliers * feature.std()


def _masked_mean(values: Tensor, kept: Tensor) -> Tensor:
    return (values * kept).sum() / kept.sum().clamp_min(1)


@torch.no_grad()
def feature_weights(output: Tensor, losses: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Eq. 9, detached: L_distill / L_feature,l times the mean of the teacher's feature norms over layer l's norm.

    A layer that agrees exactly (one before every changed block, or a student that still equals the teacher) would give
    0/0. Denominators are clamped; such a layer's term is zero whatever its weight.
    """
    if not losses:
        return {}
    norms = {name: feature.float().norm() for name, feature in teacher.items()}
    mean = torch.stack(list(norms.values())).mean()
    tiny = torch.finfo(torch.float32).eps
    return {
        # Clamped relative to the numerator, so that no weight can overflow.
        name: output
        / loss.clamp_min(tiny * output.clamp_min(tiny))
        * mean
        / norms[name].clamp_min(tiny * mean.clamp_min(tiny))
        for name, loss in losses.items()
    }


def distillation_losses(
    teacher_output: Tensor,
    student_output: Tensor,
    teacher_features: Mapping[str, Tensor],
    student_features: Mapping[str, Tensor],
    outliers: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(Eq. 7, Eq. 8 with the weights of Eq. 9) of one microbatch, scalars."""
    output = output_loss(teacher_output, student_output)
    features = feature_losses(teacher_features, student_features, outliers)
    weights = feature_weights(output, features, teacher_features)
    return output, sum((weights[name] * loss for name, loss in features.items()), output.new_zeros(()))


def balance_loss(probabilities_BTE: Tensor, experts_BTK: Tensor, kept_BT: Tensor | None = None) -> Tensor:
    """GShard's balance loss of one layer: sum_i (E / (T K)) sum_t I(t, i) * (1/T) sum_t p(t, i), averaged over sequences.

    p is the router's softmax over all experts, through which it learns. The loss is 1 when balanced, and E / K when K
    experts take everything. Tokens that `kept_BT` (bool) leaves out do not count, nor do sequences without tokens.
    """
    experts = probabilities_BTE.shape[-1]
    if experts_BTK.shape[-1] == 0:
        return probabilities_BTE.new_zeros(())
    chosen_BTE = F.one_hot(experts_BTK, experts).sum(-2).to(probabilities_BTE.dtype)
    if kept_BT is None:
        kept_BT = torch.ones_like(probabilities_BTE[..., 0], dtype=torch.bool)
    kept_BT1 = kept_BT[..., None].to(probabilities_BTE.dtype)
    tokens_B1 = kept_BT1.sum(1).clamp_min(1)
    fraction_BE = (chosen_BTE * kept_BT1).sum(1) / (tokens_B1 * experts_BTK.shape[-1])
    mean_BE = (probabilities_BTE * kept_BT1).sum(1) / tokens_B1
    loss_B = experts * (fraction_BE * mean_BE).sum(-1)
    return _masked_mean(loss_B, kept_BT.any(1))

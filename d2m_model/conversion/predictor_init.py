"""A capacity router's predictor before any training: fitted to what the experts take of calibration tokens.

Shapes: T tokens, H hidden size, D predictor width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routers.capacity_routing import CapacityTensors, initial_tensors, predict, select, share_of, thresholds_of
from ..routers.routing import float32_linear

STEPS = 300
BATCH = 1024
LEARNING_RATE = 1e-2


def fitted_tensors(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    *,
    capacity: float,
    width: int,
    generator: torch.Generator,
) -> CapacityTensors:
    """A capacity router for use without training, from calibration inputs of its FFN: float32, on the device of x.

    The predictor learns the selection by logistic regression (DiffMoE's own loss, as in training), on inputs brought to
    mean 0 and variance 1, which its first layer then takes in. Thresholds give each expert its share of these tokens.
    Raises ValueError if there are too few tokens for a share.
    """
    x_TH = x_TH.float()
    tensors = initial_tensors(x_TH, weight_EH, bias_E, capacity=capacity, width=width, generator=generator)
    selected_TE = selection(x_TH, weight_EH, bias_E, capacity).float()
    mean_H, std_H = x_TH.mean(dim=0), x_TH.std(dim=0)
    std_H = std_H.clamp_min(1e-3 * std_H.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    normal_TH = (x_TH - mean_H) / std_H
    with torch.enable_grad():
        weights = [tensors.in_weight_DH, tensors.in_bias_D, tensors.out_weight_ED, tensors.out_bias_E]
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            batch = torch.randint(len(x_TH), (min(BATCH, len(x_TH)),), generator=generator).to(x_TH.device)
            loss = F.binary_cross_entropy_with_logits(predict(normal_TH[batch], tensors), selected_TE[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    fitted = CapacityTensors(
        in_weight_DH=weights[0].detach() / std_H,
        in_bias_D=(weights[1] - (weights[0] / std_H) @ mean_H).detach(),
        out_weight_ED=weights[2].detach(),
        out_bias_E=weights[3].detach(),
        threshold_E=tensors.threshold_E,
        scale_1=tensors.scale_1,
    )
    tokens, experts = selected_TE.shape
    fitted.threshold_E = thresholds_of(predict(x_TH, fitted), share_of(tokens, experts, capacity))
    return fitted


def selection(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, capacity: float) -> Tensor:
    """bool [T, E]: what the experts take, as in training, if these tokens are the pool."""
    alpha_TE = float32_linear(x_TH, weight_EH, bias_E).softmax(dim=-1)
    taken_SE = select(alpha_TE, capacity)
    return torch.zeros_like(alpha_TE, dtype=torch.bool).scatter(0, taken_SE, True)


def predicted(x_TH: Tensor, tensors: CapacityTensors) -> Tensor:
    """bool [T, E]: what the experts take by prediction, as at inference."""
    return predict(x_TH, tensors) > tensors.threshold_E.logit()

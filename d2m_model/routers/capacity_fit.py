"""Fit of a capacity router's predictor before any training, to the experts' selection of calibration tokens.

Shapes: T tokens, H hidden size, D predictor width, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .capacity_routing import CapacityTensors, predict, select, share_of
from .routing import float32_linear

STEPS = 300
BATCH = 1024
LEARNING_RATE = 1e-2


@torch.no_grad()
def initial_tensors(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    *,
    capacity: float,
    width: int,
    generator: torch.Generator,
) -> CapacityTensors:
    """Initialise a capacity router from calibration inputs of its FFN: float32, on the device of x.

    The predictor is random (Xavier, zero biases, as in DiffMoE). Thresholds are set so that each expert gets its share of
    these tokens. The scale is 1 / mean gate of the selected tokens. Raises ValueError if there are too few tokens for a
    share.
    """
    tokens, hidden, experts = *x_TH.shape, weight_EH.shape[0]
    share = share_of(tokens, experts, capacity)
    if share == 0:
        least = math.ceil(experts / capacity)
        raise ValueError(f"There are {tokens} calibration tokens; expected {least} or more, one for each expert.")

    def xavier(outputs: int, inputs: int) -> Tensor:
        bound = math.sqrt(6 / (inputs + outputs))
        return ((2 * torch.rand(outputs, inputs, generator=generator) - 1) * bound).to(x_TH.device)

    alpha_TE = float32_linear(x_TH, weight_EH, bias_E).softmax(dim=-1)
    mean_gate = alpha_TE.gather(0, select(alpha_TE, capacity)).mean()
    tensors = CapacityTensors(
        in_weight_DH=xavier(width, hidden),
        in_bias_D=torch.zeros(width, device=x_TH.device),
        out_weight_ED=xavier(experts, width),
        out_bias_E=torch.zeros(experts, device=x_TH.device),
        threshold_E=torch.zeros(experts, device=x_TH.device),
        scale_1=mean_gate.reciprocal().view(1),
    )
    tensors.threshold_E = thresholds_of(predict(x_TH, tensors), share)
    return tensors


def thresholds_of(predicted_TE: Tensor, share: int) -> Tensor:
    """Return thresholds, float32 [E], that give each expert the `share` (1 or more) of tokens with the best predictions."""
    sorted_TE = predicted_TE.sort(dim=0, descending=True).values
    # Between the last token that passes and the first that does not.
    first_out = sorted_TE[share] if share < len(sorted_TE) else sorted_TE[-1] - 1
    return ((sorted_TE[share - 1] + first_out) / 2).sigmoid()


def fitted_tensors(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    *,
    capacity: float,
    width: int,
    generator: torch.Generator,
) -> CapacityTensors:
    """Fit a capacity router for use without training, from calibration inputs of its FFN: float32, on the device of x.

    The predictor learns the selection by logistic regression (DiffMoE's loss, as in training) on inputs normalised to
    mean 0 and variance 1; the normalisation is then merged into its first layer. Thresholds give each expert its share of
    these tokens. Raises ValueError if there are too few tokens for a share.
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
    """Return the experts' selection as in training, bool [T, E], if these tokens are the pool."""
    alpha_TE = float32_linear(x_TH, weight_EH, bias_E).softmax(dim=-1)
    taken_SE = select(alpha_TE, capacity)
    return torch.zeros_like(alpha_TE, dtype=torch.bool).scatter(0, taken_SE, True)

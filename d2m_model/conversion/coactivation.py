"""Experts of neurons that fire together: balanced clusters of which the best top_k hold the most energy.

Shapes: T tokens, H hidden size, R routed neurons, E experts, F expert width; R = E F.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import FFNLayout
from .router_init import ridge_router

ORACLE_STEPS = 3  # steps before the router chooses: it can only learn clusters that exist
MOST_STEPS = 20


def coactivation_experts(
    energy_TR: Tensor, x_TH: Tensor, layout: FFNLayout, top_k: int, generator: torch.Generator
) -> Tensor:
    """Return the expert of every routed neuron, int64 [R]; each expert gets `layout.width` of them.

    energy_TR is what a neuron adds to the FFN's output beyond its mean, squared: (a - mean a)^2 |w2|^2. Two steps in
    turn raise the energy that the chosen experts hold: choose top_k experts for each token, then deal the neurons out
    to where their energy was chosen. The choice is first the best one, then that of the ridge router on x_TH, so that
    experts come out which a linear router can tell apart.
    """
    start_R = torch.arange(energy_TR.shape[1]) % layout.experts
    expert_R = start_R[torch.randperm(len(start_R), generator=generator)].to(energy_TR.device)
    best, held = expert_R, -1.0
    for step in range(MOST_STEPS):
        energy_TE = energy_TR @ F.one_hot(expert_R, layout.experts).to(energy_TR.dtype)
        score_TE = energy_TE
        if step >= ORACLE_STEPS:
            weight_EH, bias_E = ridge_router(x_TH, energy_TE.sqrt())
            score_TE = F.linear(x_TH.float(), weight_EH, bias_E)
        chosen_TE = torch.zeros_like(energy_TE).scatter_(1, score_TE.topk(max(1, top_k), dim=1).indices, 1)
        if step >= ORACLE_STEPS:
            if (now := float((energy_TE * chosen_TE).sum())) <= held:
                break
            best, held = expert_R, now
        expert_R = balanced_assignment(energy_TR.T @ chosen_TE, expert_R)
    return best


def balanced_assignment(gain_RE: Tensor, expert_R: Tensor) -> Tensor:
    """Exchange neurons between pairs of experts until no exchange raises the total gain. Returns the experts, int64 [R].

    The sizes of the experts stay. For one pair the best exchange is exact: its neurons sorted by the difference of
    their two gains.
    """
    # In NumPy, whose calls take a tenth of the time of torch's for so few numbers.
    gain, expert = gain_RE.cpu().numpy(), expert_R.cpu().numpy().copy()
    smallest = 1e-6 * float(gain_RE.abs().mean())  # smaller gains are rounding
    changed = True
    while changed:
        changed = False
        for a, b in itertools.combinations(range(gain.shape[1]), 2):
            members = np.flatnonzero((expert == a) | (expert == b))
            prefer_a = gain[members, a] - gain[members, b]
            in_a = expert[members] == a
            best_a = np.zeros_like(in_a)
            best_a[np.argsort(-prefer_a, kind="stable")[: in_a.sum()]] = True
            if np.array_equal(best_a, in_a):
                continue
            if float(torch.from_numpy(prefer_a[best_a]).sum() - torch.from_numpy(prefer_a[in_a]).sum()) > smallest:
                expert[members] = np.where(best_a, a, b)
                changed = True
    return torch.from_numpy(expert).to(expert_R.device)

"""AdaLN compression (Sec. 4.1): modulations `lin(silu(vec))` become `lin'(U silu(vec))`; all of them share U.

A change D of the dense `lin`, by a LoRA for example, becomes the change D pinv(U) of lin': the D' whose D' U is nearest
to D. The part of D outside U's row space is lost; `lost_change` and `lost_low_rank_change` measure it.

Shapes: B batch, H hidden size, A rank of the compression, N outputs of a modulation (6H or 3H), R rank of a change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(x_BH: Tensor, down_AH: Tensor) -> Tensor:
    """Return U x [..., A], multiplied in float32, in x's dtype. `down_AH` is U, in any floating-point dtype."""
    return F.linear(x_BH.float(), down_AH.float()).to(x_BH.dtype)


def pseudo_inverse(down_AH: Tensor) -> Tensor:
    """Return pinv(U), float32 [H, A], computed in float64. U may be rank-deficient."""
    return torch.linalg.pinv(down_AH.double()).float()


def dense_weight(lin_NA: Tensor, down_AH: Tensor) -> Tensor:
    """Return lin' U, the dense equivalent of a compressed modulation: float32 [N, H]."""
    return lin_NA.float() @ down_AH.float()


def map_change(change_NH: Tensor, inverse_HA: Tensor) -> Tensor:
    """Return D pinv(U), the change of lin' that stands for a change D of the dense weight: float32 [N, A]."""
    return change_NH.float() @ inverse_HA.float()


def lost_change(change_NH: Tensor, down_AH: Tensor, inverse_HA: Tensor) -> tuple[float, float]:
    """Return (|D - D pinv(U) U|^2, |D|^2). Squares, so that several modulations can be added up."""
    rest_NH = change_NH.float() - map_change(change_NH, inverse_HA) @ down_AH.float()
    return float(rest_NH.double().square().sum()), float(change_NH.double().square().sum())


def lost_low_rank_change(up_NR: Tensor, down_RH: Tensor, down_AH: Tensor, inverse_HA: Tensor) -> tuple[float, float]:
    """Return `lost_change` of D = up down, computed with R x R matrices: |up X|^2 = tr(up^T up X X^T)."""
    up_NR, down_RH = up_NR.double(), down_RH.double()
    gram_RR = up_NR.T @ up_NR
    rest_RH = down_RH - (down_RH @ inverse_HA.double()) @ down_AH.double()
    lost, whole = ((gram_RR * (x_RH @ x_RH.T)).sum() for x_RH in (rest_RH, down_RH))
    return max(0.0, float(lost)), max(0.0, float(whole))

"""AdaLN compression (Sec. 4.1): modulations `lin(silu(vec))` held as `lin'(U silu(vec))`, U shared by all of them.

A change D of the dense `lin` (a LoRA's, say) reaches a compressed file as D pinv(U): of all changes of lin', the one
whose D' U is nearest to D. What lies outside U's row space is lost; `lost_change` and `lost_low_rank_change` say how
much.

Shapes: B batch, H hidden size, A rank of the compression, N outputs of a modulation (6H or 3H), R rank of a change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(x_BH: Tensor, down_AH: Tensor) -> Tensor:
    """U x, multiplied in float32, in x's dtype: [..., A]. `down_AH` is U, in any floating-point dtype."""
    return F.linear(x_BH.float(), down_AH.float()).to(x_BH.dtype)


def pseudo_inverse(down_AH: Tensor) -> Tensor:
    """pinv(U), computed in float64, as float32: [H, A]. U may lack rank."""
    return torch.linalg.pinv(down_AH.double()).float()


def dense_weight(lin_NA: Tensor, down_AH: Tensor) -> Tensor:
    """lin' U, the dense modulation that a compressed one stands for: float32 [N, H]."""
    return lin_NA.float() @ down_AH.float()


def map_change(change_NH: Tensor, inverse_HA: Tensor) -> Tensor:
    """D pinv(U): what a change of the dense weight is for lin'. float32 [N, A]."""
    return change_NH.float() @ inverse_HA.float()


def lost_change(change_NH: Tensor, down_AH: Tensor, inverse_HA: Tensor) -> tuple[float, float]:
    """(|D - D pinv(U) U|^2, |D|^2): squares, so that those of several modulations can be added."""
    rest_NH = change_NH.float() - map_change(change_NH, inverse_HA) @ down_AH.float()
    return float(rest_NH.double().square().sum()), float(change_NH.double().square().sum())


def lost_low_rank_change(up_NR: Tensor, down_RH: Tensor, down_AH: Tensor, inverse_HA: Tensor) -> tuple[float, float]:
    """`lost_change` of D = up down, from R x R matrices: |up X|^2 = tr(up^T up X X^T)."""
    up_NR, down_RH = up_NR.double(), down_RH.double()
    gram_RR = up_NR.T @ up_NR
    rest_RH = down_RH - (down_RH @ inverse_HA.double()) @ down_AH.double()
    lost, whole = ((gram_RR * (x_RH @ x_RH.T)).sum() for x_RH in (rest_RH, down_RH))
    return max(0.0, float(lost)), max(0.0, float(whole))

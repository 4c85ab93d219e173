"""Stand-ins of skipped blocks, fitted to a calibration in closed form (see d2m_model/stand_ins.py).

Each is fitted by itself, to how the dense model's block changes its stream: reduced-rank ridge regression, with the amount
of ridge that has the least error on tokens kept apart.

Shapes: B samples, n tokens, H hidden size, R rank, M blocks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import BlockGroup
from ..stand_ins import normed, streams_of
from .calibration import Calibration, StreamChange
from .least_squares import Normal

_RIDGES = tuple(10.0**exponent for exponent in range(-4, 1))
_APART = 4  # one run of consecutive tokens in so many is kept apart


@dataclass(kw_only=True, slots=True, frozen=True)
class FittedStandIn:
    """W_down, W_up and b, float32, and |change - stand-in| / |change| on tokens that no fit has seen."""

    down_RH: Tensor
    up_HR: Tensor
    bias_H: Tensor
    error: float

    def left(self, seen: StreamChange) -> Tensor:
        """Return change - stand-in, [n, H]."""
        x_nH = normed(seen.before_nH.float())
        return seen.change_nH.float() - x_nH @ self.down_RH.T @ self.up_HR.T - self.bias_H

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        return {f"{name}.down.weight": self.down_RH, f"{name}.up.weight": self.up_HR, f"{name}.up.bias": self.bias_H}


@dataclass(kw_only=True, slots=True, frozen=True)
class FittedStandIns:
    """The stand-ins of one group.

    tensors  by their names in the file
    errors   FittedStandIn.error by block and stream
    left_BM  of each sample: the root mean square of what each block's stand-in leaves of its change of an image token (in
             single blocks, of any token)
    """

    tensors: dict[str, Tensor]
    errors: dict[str, float]
    left_BM: Tensor


def fit_stand_ins(name: str, group: BlockGroup, calibration: Calibration, rank: int) -> FittedStandIns:
    """Fit the stand-ins of the group `name`. Raises ValueError for too few tokens."""
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    left = []
    for position, block in enumerate(group.members):
        for stream in streams_of(block):
            seen = calibration.stream_change(block.name, stream)
            fitted = fit_stand_in(seen, rank)
            tensors |= fitted.tensors(f"{name}.stand_ins.{position}.{stream}")
            errors[f"{block.name}.{stream}"] = fitted.error
            if stream != "txt":
                squares = fitted.left(seen).square().sum(1).split(seen.tokens_B.tolist())
                left.append(torch.stack([square_n.mean() for square_n in squares]).sqrt())
    return FittedStandIns(tensors=tensors, errors=errors, left_BM=torch.stack(left, dim=1))


@torch.no_grad()
def fit_stand_in(seen: StreamChange, rank: int) -> FittedStandIn:
    """Fit the stand-in of a block for one stream. Raises ValueError for fewer tokens than can be kept apart."""
    x_nH, y_nH = normed(seen.before_nH.float()), seen.change_nH.float()
    count = len(x_nH)
    if count < 2 * _APART:
        raise ValueError(f"There are {count} tokens of the stream; expected {2 * _APART} or more.")
    # Whole runs, since neighbours come from one sample.
    apart_n = torch.arange(count) * 2 * _APART // count % _APART == _APART - 1
    fitted = Normal(x_nH[~apart_n], y_nH[~apart_n])
    errors = {}
    for amount in _RIDGES:
        down_RH, up_HR, bias_H = _low_rank(fitted, amount, rank)
        left_nH = y_nH[apart_n] - x_nH[apart_n] @ down_RH.T @ up_HR.T - bias_H
        errors[amount] = float(left_nH.norm() / y_nH[apart_n].norm().clamp_min(torch.finfo(torch.float32).tiny))
    best = min(errors, key=lambda amount: errors[amount])
    down_RH, up_HR, bias_H = _low_rank(Normal(x_nH, y_nH), best, rank)
    return FittedStandIn(down_RH=down_RH, up_HR=up_HR, bias_H=bias_H, error=errors[best])


def _low_rank(normal: Normal, amount: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return W_down [R, H], W_up [H, R] and b [H], float32: ridge regression onto the R main directions of its values."""
    weight_IO, _ = normal.solve(amount)
    values_OO = weight_IO.T @ normal.gram_II @ weight_IO
    main_OR = torch.linalg.eigh(values_OO).eigenvectors[:, -rank:]
    down_RH = (weight_IO @ main_OR).T
    bias_H = normal.y_mean_O - normal.x_mean_I @ weight_IO @ main_OR @ main_OR.T
    # What the directions leave out has a mean of zero, so that b keeps the mean of all changes.
    size_R = down_RH.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()  # halves keep within 16-bit floats
    down_RH, up_HR = down_RH / size_R[:, None], main_OR * size_R
    return down_RH.float().contiguous(), up_HR.float().contiguous(), bias_H.float()

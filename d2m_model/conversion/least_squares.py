"""Ridge regression in closed form.

Shapes: T observations, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Normal:
    """Normal equations of y_TO on x_TI with an intercept, float64: summed once, solved for any amount of ridge."""

    def __init__(self, x_TI: Tensor, y_TO: Tensor) -> None:
        self.x_mean_I, self.y_mean_O = x_TI.double().mean(0), y_TO.double().mean(0)
        x_TI, y_TO = x_TI.double() - self.x_mean_I, y_TO.double() - self.y_mean_O
        self.gram_II, self.moment_IO = x_TI.T @ x_TI, x_TI.T @ y_TO

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return weight [I, O] and intercept [O] that minimise |y - x W - b|^2 + |ridge-weighted W|^2.

        `ridge` is relative to each input's own sum of squares, so that the scale of an input does not matter; an input
        that never varies gets that of the mean one.
        """
        gram_II = self.gram_II.clone()
        square_I = gram_II.diagonal()
        mean = square_I.mean().clamp_min(torch.finfo(torch.float64).tiny)
        square_I += ridge * torch.maximum(square_I, 1e-3 * mean)
        weight_IO = torch.cholesky_solve(self.moment_IO, torch.linalg.cholesky(gram_II))
        return weight_IO, self.y_mean_O - self.x_mean_I @ weight_IO


def ridge(x_TI: Tensor, y_TO: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """Return weight [I, O] and intercept [O], float64. `amount` is the ridge of Normal.solve."""
    return Normal(x_TI, y_TO).solve(amount)

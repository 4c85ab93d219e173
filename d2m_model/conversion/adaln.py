"""AdaLN compression (Sec. 4.1): every `mod.lin(silu(vec))` becomes `lin'(U silu(vec))`, with one U for all of them.

Reduced-rank regression fits all modulations together: U spans the directions of silu(vec) that they read. These are not
its principal directions (emoji FLUX, rank 11 of 128: 4.7 % error against 6.5 % with the principal directions).
Shapes: H hidden size, A rank, O outputs of a modulation, n samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLED_ROWS = 128  # of every H rows of a modulation: enough to find what all rows read


@dataclass(kw_only=True, slots=True, frozen=True)
class VecMoments:
    """Mean [H] and covariance [H, H] of silu(vec) over timesteps, guidances and prompts. The fit uses their dtype."""

    mean_H: Tensor
    covariance_HH: Tensor

    @classmethod
    def of(cls, samples_nH: Tensor) -> VecMoments:
        return cls(mean_H=samples_nH.double().mean(0), covariance_HH=torch.cov(samples_nH.double().T))

    def widened(self, share: float) -> VecMoments:
        """Add `share` of the mean variance in every direction, for a calibration with few prompts.

        Few prompts do not span what others need, and U has room for more directions. (Emoji FLUX, share 0.2: 7.4 % error
        instead of 7.9 % from 4 prompts, 11 % instead of 13 % from 1 prompt, no difference from 64.)
        """
        extra_HH = share * self.covariance_HH.diagonal().mean() * torch.eye(len(self.mean_H)).to(self.covariance_HH)
        return VecMoments(mean_H=self.mean_H, covariance_HH=self.covariance_HH + extra_HH)

    @classmethod
    def unknown(cls, hidden_size: int) -> VecMoments:
        """Weigh every direction alike, for a conversion without data. float32, since it takes a third of the time."""
        return cls(mean_H=torch.zeros(hidden_size), covariance_HH=torch.eye(hidden_size))


class FittedModulations:
    """The fit behind interfaces.Modulations. `compress` adds to `errors`: |compressed - dense| / |dense| of the outputs."""

    def __init__(self, moments: VecMoments, weights_OH: Iterable[Tensor], rank: int) -> None:
        """`weights_OH` are the weights of every modulation. Only some rows of each are read."""
        self.moments = moments
        hidden_size = len(moments.mean_H)
        if not 1 <= rank <= hidden_size:
            raise ValueError(f"AdaLN rank is {rank}; expected 1 to {hidden_size}.")
        covariance_HH = moments.covariance_HH
        dtype = covariance_HH.dtype
        ridge = 1e-6 * covariance_HH.diagonal().mean() * torch.eye(hidden_size, dtype=dtype)
        root_HH = torch.linalg.cholesky(covariance_HH + ridge)
        read_HH = torch.zeros_like(root_HH)
        for weight_OH in weights_OH:
            # Contiguous rows, so that only these are read from a mapped file.
            rows = torch.cat([part[:_SAMPLED_ROWS] for part in weight_OH.split(hidden_size)]).float()
            gram_HH = (rows.T @ rows).to(dtype)
            read_HH += gram_HH / (gram_HH * covariance_HH).sum()  # every modulation has the same weight
        directions_HA = torch.linalg.eigh(root_HH.T @ read_HH @ root_HH).eigenvectors[:, -rank:]
        span_HA = torch.linalg.solve_triangular(root_HH.T, directions_HA, upper=True)
        self.adaln_in_AH = torch.linalg.qr(span_HA).Q.T.float().contiguous()
        self.errors: dict[str, float] = {}

        down_AH = self.adaln_in_AH.to(dtype)
        covariance_AA = down_AH @ covariance_HH @ down_AH.T
        # lin' = lin * lift: least squares of the modulation on U silu(vec).
        self._lift_HA = torch.linalg.solve(covariance_AA, down_AH @ covariance_HH).T
        self._left_H = moments.mean_H - self._lift_HA @ (down_AH @ moments.mean_H)
        lost_HH = torch.eye(hidden_size, dtype=dtype) - self._lift_HA @ down_AH
        self._lost_HH = lost_HH @ covariance_HH @ lost_HH.T

    def compress(self, name: str, weight_OH: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias of lin' by least squares: float32 [O, A], [O]."""
        weight_OH, bias_O = weight_OH.float(), bias_O.float()
        self.errors[name] = self._error(weight_OH, bias_O)
        return weight_OH @ self._lift_HA.float(), bias_O + weight_OH @ self._left_H.float()

    def _error(self, weight_OH: Tensor, bias_O: Tensor) -> float:
        """Return the relative error of the outputs by the moments, on a sample of the rows."""
        rows = slice(None, None, max(1, len(weight_OH) // _SAMPLED_ROWS))  # spread over all outputs
        weight_OH, bias_O = weight_OH[rows].to(self._lost_HH), bias_O[rows].to(self._lost_HH)
        lost = ((weight_OH @ self._lost_HH) * weight_OH).sum()
        mean_O = weight_OH @ self.moments.mean_H + bias_O
        whole = ((weight_OH @ self.moments.covariance_HH) * weight_OH).sum() + mean_O.square().sum()
        return float((lost / whole).clamp_min(0).sqrt())

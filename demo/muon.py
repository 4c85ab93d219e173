"""Muon (Jordan et al. 2024), for all matrices of one shape at a time.

The emoji FLUX has 154 matrices of only four shapes. torch.optim.Muon updates them one by one, which takes half as long as
forward and backward pass together. Update rule and scaling are those of torch.optim.Muon with
`adjust_lr_fn="match_rms_adamw"`, so that a learning rate for AdamW fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix's singular value decomposition: [B, M, N] -> [B, M, N].

    Newton-Schulz iteration in bfloat16.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.transpose(1, 2)).bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    a, b, c = _COEFFICIENTS
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.transpose(1, 2)).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """An optimizer for matrices only; biases, norms and embeddings belong to AdamW."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(gradient, 1 - _MOMENTUM)
                    by_shape[parameter.shape].append((parameter, gradient.lerp(momentum, _MOMENTUM)))  # Nesterov's
            for shape, pairs in by_shape.items():
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = orthogonalised(torch.stack([update for _, update in pairs]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

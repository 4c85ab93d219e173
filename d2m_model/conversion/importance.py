"""Importance of each hidden neuron of an FFN: one number per neuron, float32 [N].

Taylor (Eq. 6) needs a loss on calibration data and a backward pass; the activation needs inputs of the FFN; the weight
norm needs nothing but the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 18  # elements converted to float32 at a time, which stay in the cache
NEURONS = 1024  # neurons whose activations are computed at a time


def weight_norm_importance(up_NH: Tensor, up_bias_N: Tensor, down_HN: Tensor) -> Tensor:
    """Return |(W1 row, b1 entry)| * |W2 column| (Euclidean), a bound of a neuron's output for inputs of norm 1."""
    read_N = torch.cat([part.float().square().sum(1) for part in up_NH.split(max(1, CHUNK // up_NH.shape[1]))])
    read_N += up_bias_N.float().square()
    written_N = torch.zeros(down_HN.shape[1])
    for part in down_HN.split(max(1, CHUNK // down_HN.shape[1])):
        written_N += part.float().square().sum(0)
    return (read_N * written_N).sqrt()


def activation_importance(up_NH: Tensor, up_bias_N: Tensor, down_HN: Tensor, inputs_TH: Tensor) -> Tensor:
    """Return the root mean square of a neuron's output, |h_n(x)| |W2 column|, over the inputs. The result is on the CPU.

    Forward only, and as good as Taylor's where it was measured (docs/training-free.md).
    """
    place = {"device": inputs_TH.device, "dtype": torch.float32}
    energies = []
    for rows, bias in zip(up_NH.split(NEURONS), up_bias_N.split(NEURONS), strict=True):
        hidden_TN = F.linear(inputs_TH.float(), rows.to(**place), bias.to(**place))
        energies.append(F.gelu(hidden_TN, approximate="tanh").square_().mean(0))
    written_N = torch.cat([part.to(**place).square().sum(0) for part in down_HN.split(NEURONS, 1)])
    return (torch.cat(energies) * written_N).sqrt().cpu()


@dataclass
class TaylorImportance:
    """Eq. 6 over all backward passes until `close`: per neuron the sum of |dL/dw * w| over W1 row, b1 entry, W2 column.

    A gradient is reduced to its neurons and freed as soon as it is computed, so memory holds the weights and one gradient.
    Parameters of the model outside these FFNs are frozen by the constructor `of`.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, ffns: Iterable[tuple[str, nn.Linear, nn.Linear, int]]) -> TaylorImportance:
        """Watch FFNs given as a host's `ffn_linears` lists them: name, up, down, column of `down` where its neurons begin."""
        model.requires_grad_(False)
        taylor = cls()
        for name, up, down, first_column in ffns:
            taylor.scores[name] = torch.zeros(up.out_features, device=up.weight.device)
            taylor._watch(name, up.weight, axis=0, first=0)
            taylor._watch(name, up.bias, axis=0, first=0)
            taylor._watch(name, down.weight, axis=1, first=first_column)
        return taylor

    def _watch(self, name: str, parameter: Tensor, *, axis: int, first: int) -> None:
        """Add the contribution of `parameter` to the score of `name`. Its neurons are along `axis`, from `first` on."""

        @torch.no_grad()
        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total = self.scores[name]
            score = (parameter.grad.float() * parameter.float()).abs_()
            total += score.movedim(axis, 0).narrow(0, first, len(total)).reshape(len(total), -1).sum(1)
            parameter.grad = None

        parameter.requires_grad_(True)
        self._hooks.append(parameter.register_post_accumulate_grad_hook(accumulate))

    def close(self) -> dict[str, Tensor]:
        """Remove the hooks and return the scores on the CPU."""
        for hook in self._hooks:
            hook.remove()
        return {name: score.cpu() for name, score in self.scores.items()}

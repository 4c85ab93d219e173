"""DiffMoE's router written out token by token, in float64, and random layers that it routes."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from d2m_model.config import FFNLayout, Gate
from d2m_model.moe import FusedFFN, MoEFFN
from d2m_model.routers import CapacityRouter, Routing
from d2m_model.routers.capacity import CapacityPredictor
from d2m_model.routers.capacity_routing import (
    CapacityTensors,
    PoolRouting,
)
from d2m_model.routers.token_router import BIAS, WEIGHT

from .reference import MoE

SUM = Gate(mode="sum", scale=5.0)  # whose scale is not used, in either mode
NORMALISED = Gate(mode="normalised", scale=5.0)
LAYOUT = FFNLayout(shared=16, experts=6, width=8)
WIDTH = 5  # of predictors


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_tensors(hidden: int, experts: int, width: int, seed: int = 0) -> CapacityTensors:
    return CapacityTensors(
        in_weight_DH=normal(seed, width, hidden) * hidden**-0.5,
        in_bias_D=normal(seed + 1, width),
        out_weight_ED=normal(seed + 2, experts, width) * 2 * width**-0.5,
        out_bias_E=normal(seed + 3, experts),
        threshold_E=normal(seed + 4, experts).sigmoid(),
        scale_1=torch.tensor([3.0]),
    )


def random_ffn(hidden: int, layout: FFNLayout, seed: int = 0, *, mean: bool = True, capacity: bool = True) -> FusedFFN:
    return FusedFFN(
        up_weight_NH=normal(seed, layout.neurons, hidden) * hidden**-0.5,
        up_bias_N=normal(seed + 1, layout.neurons),
        down_weight_HN=normal(seed + 2, hidden, layout.neurons) * layout.neurons**-0.5,
        down_bias_H=normal(seed + 3, hidden),
        router={
            WEIGHT: normal(seed + 4, layout.experts, hidden) * hidden**-0.5,
            BIAS: normal(seed + 5, layout.experts),
            **(random_tensors(hidden, layout.experts, WIDTH, seed + 7).named() if capacity else {}),
        },
        expert_mean_EH=normal(seed + 6, layout.experts, hidden) * 0.1 if mean else None,
    )


def routed_by_capacity(ffn: FusedFFN, gate: Gate, layout: FFNLayout = LAYOUT, capacity: float = 2.0) -> MoEFFN:
    return MoEFFN(ffn, layout=layout, gate=gate, top_k=2, router=CapacityRouter(capacity=capacity, width=WIDTH))


def predictor(layer: MoEFFN) -> CapacityPredictor:
    assert isinstance(layer.companion, CapacityPredictor)
    return layer.companion


def pooled(layer: MoEFFN) -> PoolRouting:
    """The pool of the last forward pass in training."""
    found = predictor(layer).pooled
    assert found is not None
    return found


def update(layer: MoEFFN) -> None:
    """One training step of one microbatch on one rank."""
    predictor(layer).update(predictor(layer).take_update())


# Literally


def double(tensors: CapacityTensors) -> CapacityTensors:
    return CapacityTensors(**{f.name: getattr(tensors, f.name).double() for f in dataclasses.fields(tensors)})


def literal_prediction(x_H: Tensor, tensors: CapacityTensors) -> Tensor:
    """The predictor's probabilities for one token, float64."""
    pre_D = tensors.in_weight_DH @ x_H + tensors.in_bias_D
    return 1 / (1 + torch.exp(-(tensors.out_weight_ED @ (pre_D / (1 + torch.exp(-pre_D))) + tensors.out_bias_E)))


def literal_selection(alpha_TE: Tensor, pool: list[int], capacity: float) -> dict[int, list[int]]:
    """Return the experts that take each token."""
    experts = alpha_TE.shape[1]
    share = math.floor(len(pool) / experts * capacity + 1e-9)
    taken: dict[int, list[int]] = {t: [] for t in range(len(alpha_TE))}
    for e in range(experts):
        for t in sorted(pool, key=lambda t: (-alpha_TE[t, e].item(), t))[:share]:
            taken[t].append(e)
    return taken


class CapacityMoE(MoE):
    """Eq. 2 with DiffMoE's gates: scale * alpha of the experts that took the token (`taken`), not renormalised."""

    taken: dict[int, list[int]]
    scale: Tensor

    def gates(self, t: int, x_H: Tensor) -> dict[int, Tensor]:
        logits_E = self.router_EH @ x_H + (0 if self.router_bias_E is None else self.router_bias_E)
        alpha_E = logits_E.softmax(dim=0)
        weights = {e: self.scale * alpha_E[e] for e in self.taken[t]}
        return {
            e: weight if self.gate.mode == "normalised" else torch.ones_like(weight) for e, weight in weights.items()
        }


def literal_ffn(
    weights: list[Tensor | None], layout: FFNLayout, gate: Gate, taken: dict[int, list[int]]
) -> CapacityMoE:
    """Return a literal FFN of float64 weights in FusedFFN's order, followed by the scale of the gates."""
    *fused, scale = weights
    moe = CapacityMoE(*fused, layout, gate, top_k=0)  # type: ignore[arg-type]
    assert scale is not None
    moe.taken, moe.scale = taken, scale
    return moe


def weights_of(ffn: FusedFFN) -> list[Tensor | None]:
    dense = [ffn.up_weight_NH, ffn.up_bias_N, ffn.down_weight_HN, ffn.down_bias_H]
    weights = [*dense, ffn.router[WEIGHT], ffn.router[BIAS], ffn.expert_mean_EH, ffn.router["capacity.scale"][0]]
    return [None if tensor is None else tensor.double() for tensor in weights]


def taken_of(routing: Routing) -> dict[int, list[int]]:
    taken: dict[int, list[int]] = {t: [] for t in range(len(routing.logits_TE))}
    for t, e in zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True):
        taken[t].append(e)
    return taken

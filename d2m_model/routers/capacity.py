"""DiffMoE's capacity router as a kind of token router: its settings, its tensors, and its module in training.

The routing itself is in capacity_routing.py. Shapes: T tokens, H hidden size, D predictor width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..fields import expect
from .capacity_fit import fitted_tensors, selection
from .capacity_routing import (
    CapacityTensors,
    PoolRouting,
    begin_by_threshold,
    route_pool,
    scaled_threshold,
    updated_threshold,
)
from .linear import RouterLinear, copied_linear
from .routing import Gate, Routing
from .token_router import BIAS, WEIGHT, RouterTensors, TokenRouter, TrainingCompanion

PREDICTOR_WIDTH = 128  # DiffMoE's is as wide as the hidden size: at 3072 that is 9.4 million parameters for each FFN


@dataclass(kw_only=True, frozen=True)
class CapacityRouter(TokenRouter):
    """Experts take tokens, and a predictor h -> `width` -> n says which (DiffMoE, Shi et al. 2025).

    In training each of n experts takes 1/n of the tokens times `capacity`, which is thus the mean number of experts of
    a token. `Gate.scale` is not used, because every FFN has a scale of its own.
    """

    capacity: float
    width: int = PREDICTOR_WIDTH

    kind: ClassVar[str] = "capacity"
    named: ClassVar[str] = "a capacity router"
    setting: ClassVar[str] = "capacity"
    label: ClassVar[str] = "Capacity"
    option: ClassVar[str] = "--capacity-factor"
    steering: ClassVar[str] = (
        "its capacity routers give every token as many experts as it needs. Set `capacity` instead."
    )
    whole: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True
    balanced: ClassVar[bool] = False  # a pool gives every expert its share
    companion_name: ClassVar[str | None] = "capacity"
    names_in_model: ClassVar[Mapping[str, str]] = {"threshold": "capacity.threshold"}

    def check(self, experts: int) -> None:
        holds = 0 < self.capacity <= (experts or self.capacity)
        expect(holds, "capacity_router.capacity", self.capacity, f"above 0, up to {experts}")
        expect(self.width >= 1, "capacity_router.width", self.width, "1 or more")

    def shapes(self, hidden_size: int, experts: int) -> dict[str, tuple[int, ...]]:
        return {
            **super().shapes(hidden_size, experts),
            "capacity.in_layer.weight": (self.width, hidden_size),
            "capacity.in_layer.bias": (self.width,),
            "capacity.out_layer.weight": (experts, self.width),
            "capacity.out_layer.bias": (experts,),
            "capacity.scale": (1,),
            "threshold": (experts,),
        }

    def problems(self, ffn: str, tensor: Callable[[str], Tensor]) -> Iterator[str]:
        threshold_E, scale_1 = tensor(f"{ffn}.threshold"), tensor(f"{ffn}.capacity.scale")
        if threshold_E.min() < 0 or threshold_E.max() > 1:
            yield f"{ffn}.threshold is {threshold_E.min():g} to {threshold_E.max():g}; expected probabilities, 0 to 1."
        if scale_1 <= 0:
            yield f"{ffn}.capacity.scale is {scale_1.item():g}; expected a positive number."

    def route(self, x_TH: Tensor, tensors: RouterTensors, *, gate: Gate, value: float) -> Routing:
        return self.begin(x_TH, tensors, gate=gate, value=value)()

    def begin(self, x_TH: Tensor, tensors: RouterTensors, *, gate: Gate, value: float) -> Callable[[], Routing]:
        weight_EH, bias_E = tensors[WEIGHT], tensors.get(BIAS)
        return begin_by_threshold(x_TH, weight_EH, bias_E, CapacityTensors.of(tensors), gate=gate, factor=value)

    def companion(self, tensors: RouterTensors) -> CapacityPredictor:
        return CapacityPredictor(CapacityTensors.of(tensors), capacity=self.capacity)

    def own_value(self, top_k: int) -> float:
        return 1.0

    def checked(self, value: float, experts: int) -> float:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"Capacity is {value}; expected 0 (no experts) or more, where 1 is the file's own.")
        return value

    def highest(self, experts: int) -> None:
        return None

    def note(self, value: float, experts: int) -> str:
        mean = self.experts_per_token(value, experts)
        if value in (0, 1):
            return f"Capacity {value:g}: {mean:g} experts a token on average."
        return f"At capacity {value:g} an estimate: about {mean:.1f} experts a token, which depends on the image."

    def saved(self, name: str, tensor: Tensor, value: float) -> Tensor:
        return scaled_threshold(tensor, value) if name.endswith(".threshold") and value != 1 else tensor

    def described(self, top_k: int) -> str:
        return f"by capacity, {self.capacity:g} experts a token on average, predictor {self.width} wide"

    def experts_per_token(self, value: float, experts: int) -> float:
        """At factor 1 the router's own capacity, at 0 none.

        At other factors it depends on the tokens, and this is an estimate: the factor multiplies the odds with which
        predictions pass their thresholds, here those of an expert to take a token.
        """
        if value == 1 or not experts:
            return self.capacity
        share = self.capacity / experts
        return experts * value * share / (1 - share + value * share)

    @classmethod
    def for_conversion(cls, *, top_k: int, predictor_width: int) -> CapacityRouter:
        return cls(capacity=float(top_k), width=predictor_width)

    @property
    def provenance(self) -> dict[str, object]:
        return {"predictor_width": self.width}

    def fit(self, x_TH: Tensor, tensors: RouterTensors, generator: torch.Generator) -> dict[str, Tensor]:
        fitted = fitted_tensors(
            x_TH, tensors[WEIGHT], tensors.get(BIAS), capacity=self.capacity, width=self.width, generator=generator
        )
        return fitted.named()

    def fit_report(self, x_TH: Tensor, tensors: RouterTensors, chosen_TE: Tensor) -> dict[str, float]:
        wanted_TE = selection(x_TH, tensors[WEIGHT], tensors.get(BIAS), self.capacity)
        both, either = (chosen_TE & wanted_TE).sum(), chosen_TE.sum() + wanted_TE.sum()
        return {"agrees": float(2 * both / either.clamp_min(1)), "experts": float(chosen_TE.sum() / len(chosen_TE))}


class CapacityPredictor(TrainingCompanion):
    """Parameters (`in_layer`, `out_layer`) and buffers (`threshold` [E], `scale` [1]) of a capacity router beside W_g.

    `capacity` is the mean number of experts of a token in training. `pooled` is what the last pool was routed to, until
    `take_update`.
    """

    loss_name: ClassVar[str] = "predictor"
    threshold: Tensor
    scale: Tensor

    def __init__(self, tensors: CapacityTensors, *, capacity: float) -> None:
        super().__init__()
        self.capacity = capacity
        self.in_layer = copied_linear(tensors.in_weight_DH, tensors.in_bias_D, RouterLinear)
        self.out_layer = copied_linear(tensors.out_weight_ED, tensors.out_bias_E, RouterLinear)
        self.register_buffer("threshold", tensors.threshold_E.detach().clone())
        self.register_buffer("scale", tensors.scale_1.detach().clone())
        self.pooled: PoolRouting | None = None

    def forward(self) -> dict[str, Tensor]:
        (in_weight_DH, in_bias_D), (out_weight_ED, out_bias_E) = self.in_layer(), self.out_layer()
        tensors = CapacityTensors(
            in_weight_DH=in_weight_DH,
            in_bias_D=in_bias_D,
            out_weight_ED=out_weight_ED,
            out_bias_E=out_bias_E,
            threshold_E=self.threshold,
            scale_1=self.scale,
        )
        return tensors.named()

    def route(self, x_TH: Tensor, tensors: RouterTensors, gate: Gate, *, remember: bool) -> Routing:
        pooled = route_pool(
            x_TH, tensors[WEIGHT], tensors.get(BIAS), CapacityTensors.of(tensors), gate=gate, capacity=self.capacity,
            pool_P=self.pool_P,
        )  # fmt: skip
        if remember:
            self.pooled = pooled
        return pooled.routing

    @property
    def learns(self) -> bool:
        return self.in_layer.weight.requires_grad

    def loss(self) -> Tensor | None:
        return None if self.pooled is None else self.pooled.predictor_loss()

    def take_update(self) -> Tensor:
        pooled, self.pooled = self.pooled, None
        return updated_threshold(self.threshold, pooled)

    def update(self, values: Tensor) -> None:
        self.threshold.copy_(values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.in_layer.reset_parameters()
        self.out_layer.reset_parameters()
        self.threshold.fill_(0.5)
        self.scale.fill_(1)

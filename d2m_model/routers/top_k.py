"""Top-k router: every token goes to the k experts that it scores highest (Sec. 3.1, Eq. 3).

Shapes: T tokens, H hidden size, E experts, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.choice import has_kernels
from .routing import Gate, Routing, SortedRows, float32_linear
from .token_router import BIAS, WEIGHT, RouterTensors, TokenRouter


@dataclass(kw_only=True, frozen=True)
class TopKRouter(TokenRouter):
    """The paper's router, which files have unless they say otherwise. Its k is the configuration's top_k."""

    kind: ClassVar[str] = "top_k"
    named: ClassVar[str] = "top-k routers"
    setting: ClassVar[str] = "top_k"
    label: ClassVar[str] = "Top-K"
    option: ClassVar[str] = "--top-k"
    steering: ClassVar[str] = "it has no capacity routers. Set `top_k` instead."
    whole: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    balanced: ClassVar[bool] = True

    def route(self, x_TH: Tensor, tensors: RouterTensors, *, gate: Gate, value: float) -> Routing:
        return route_top_k(x_TH, tensors[WEIGHT], tensors.get(BIAS), top_k=int(value), gate=gate)

    def own_value(self, top_k: int) -> int:
        return top_k

    def checked(self, value: float, experts: int) -> float:
        if not 0 <= value <= experts:
            raise ValueError(
                f"Top-K is {value}, but this FLUX-MoE has {experts} experts per FFN. Choose 0 to {experts}."
            )
        return value

    def highest(self, experts: int) -> int:
        return experts

    def described(self, top_k: int) -> str:
        return f"top-{top_k}"

    def experts_per_token(self, value: float, experts: int) -> float:
        return value

    @classmethod
    def for_conversion(cls, *, top_k: int, predictor_width: int) -> TopKRouter:
        return cls()

    def chosen(self, x_TH: Tensor, tensors: RouterTensors, top_k: int) -> Tensor:
        return chosen_top_k(x_TH, tensors[WEIGHT], tensors.get(BIAS), top_k)


def check_top_k(top_k: int, experts: int) -> None:
    """Raise ValueError unless 0 <= top_k <= experts."""
    if not 0 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; expected 0 to {experts}, the number of experts.")


def route_top_k(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, *, top_k: int, gate: Gate) -> Routing:
    """Eq. 3: the top_k experts of alpha = softmax(W_g x), in float32 whatever the dtypes of x and W_g.

    gate.mode `sum`: every chosen expert has weight 1. `normalised`: gate.scale * alpha_i / sum of the
    chosen alphas, through which the router learns. Equal logits go to the lower expert index, on every
    device. Raises ValueError for a top_k outside 0 ... E.
    """
    check_top_k(top_k, weight_EH.shape[0])
    learns = torch.is_grad_enabled() and (x_TH.requires_grad or weight_EH.requires_grad)
    if has_kernels(x_TH) and not learns:
        return _route_in_kernels(x_TH, weight_EH, bias_E, top_k, gate)
    logits_TE = float32_linear(x_TH, weight_EH, bias_E)
    # A stable sort, because torch.topk promises no order among ties. Logits order as their softmax does.
    experts_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if gate.mode == "sum":
        gates_TK = torch.ones_like(experts_TK, dtype=torch.float32)
    else:
        # Renormalising a softmax over the chosen is the softmax of their logits.
        gates_TK = gate.scale * logits_TE.gather(-1, experts_TK).softmax(dim=-1)
    return Routing.even(experts_TK, gates_TK, logits_TE, gate_unit=gate.scale)


def _route_in_kernels(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, top_k: int, gate: Gate) -> Routing:
    from ..kernels.routing import route_and_sort

    normalised = gate.mode == "normalised"
    choice = route_and_sort(x_TH, weight_EH, bias_E, top_k=top_k, normalised=normalised, scale=gate.scale)
    rows = SortedRows(choice.token_A, choice.slot_A, choice.ends_E)
    return Routing.even(choice.experts_TK, choice.gates_TK, choice.logits_TE, gate_unit=gate.scale, rows=rows)


def chosen_top_k(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, top_k: int) -> Tensor:
    """bool [T, E]: the experts that `route_top_k` gives float32 tokens."""
    logits_TE = F.linear(x_TH, weight_EH.to(x_TH), None if bias_E is None else bias_E.to(x_TH))
    first_TK = logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, first_TK, True)

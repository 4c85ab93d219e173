"""The MoE FFN (Sec. 3.1, Eq. 1-3): a shared expert that every token visits, and routed ones.

Shapes: T tokens, H hidden size, N = S + E F neurons, S shared neurons, E experts, F expert width, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import FFNLayout, Gate
from .experts import expert_down, expert_up, mean_compensation, plan_dispatch
from .layout import expert_views
from .routers import Routing, route_top_k


def routed_experts(
    x_TH: Tensor,
    routing: Routing,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    down_HEF: Tensor,
    expert_mean_EH: Tensor | None,
) -> Tensor:
    """The second term of Eq. 2, with mean compensation if there are means: y_TH, to be added to the shared expert's."""
    plan = plan_dispatch(routing, x_TH)
    y_TH = expert_down(expert_up(x_TH, plan, up_EFH, up_bias_EF), plan, down_HEF)
    if expert_mean_EH is not None:
        y_TH = y_TH + mean_compensation(routing, expert_mean_EH, y_TH.dtype)
    return y_TH


def shared_expert(x: Tensor, up_SH: Tensor, up_bias_S: Tensor, down_HS: Tensor, down_bias_H: Tensor) -> Tensor:
    """W2 gelu_tanh(W1 x + b1) + b2 (Eq. 1). b2 belongs to the shared expert."""
    return F.linear(F.gelu(F.linear(x, up_SH, up_bias_S), approximate="tanh"), down_HS, down_bias_H)


def moe_ffn(
    x: Tensor,
    up_weight_NH: Tensor,
    up_bias_N: Tensor,
    down_weight_HN: Tensor,
    down_bias_H: Tensor,
    router_weight_EH: Tensor,
    router_bias_E: Tensor | None,
    expert_mean_EH: Tensor | None,
    *,
    layout: FFNLayout,
    gate: Gate,
    top_k: int,
) -> Tensor:
    """Eq. 2 on the fused weights, whose neurons stand as `layout` says; x and the result are [..., H].

    In gate mode `sum` with top_k = E this is the dense FFN. Raises ValueError for a top_k outside 0 ... E.
    """
    x_TH = x.reshape(-1, x.shape[-1])
    routing = route_top_k(x_TH, router_weight_EH, router_bias_E, top_k=top_k, gate=gate)
    views = expert_views(up_weight_NH, up_bias_N, down_weight_HN, layout)
    shared = slice(0, layout.shared)
    y_TH = shared_expert(
        x_TH, up_weight_NH[shared], up_bias_N[shared], down_weight_HN[:, shared], down_bias_H
    ) + routed_experts(x_TH, routing, *views, expert_mean_EH)
    return y_TH.view(x.shape)


@dataclass(kw_only=True, slots=True)
class FusedFFN:
    """One MoE FFN as the file holds it: weights of dense FLUX's shapes, neurons in the layout's order."""

    up_weight_NH: Tensor
    up_bias_N: Tensor
    down_weight_HN: Tensor
    down_bias_H: Tensor
    router_weight_EH: Tensor
    router_bias_E: Tensor | None
    expert_mean_EH: Tensor | None


class MoEFFN(nn.Module):
    """A MoE FFN with shared and routed weights apart, so that each can be trained or frozen by itself.

    Parameters: `shared_up` and `shared_down` (linear layers), `routed_up` [E, F, H], `routed_up_bias` [E, F],
    `routed_down` [E, H, F], `router` (a linear layer) and, if the file has it, `expert_mean` [E, H].
    """

    def __init__(self, fused: FusedFFN, *, layout: FFNLayout, gate: Gate, top_k: int) -> None:
        super().__init__()
        self.layout, self.gate, self.top_k = layout, gate, top_k
        shared = slice(0, layout.shared)
        up_EFH, up_bias_EF, down_HEF = expert_views(fused.up_weight_NH, fused.up_bias_N, fused.down_weight_HN, layout)
        self.shared_up = _linear(fused.up_weight_NH[shared], fused.up_bias_N[shared])
        self.shared_down = _linear(fused.down_weight_HN[:, shared], fused.down_bias_H)
        self.routed_up = _parameter(up_EFH)
        self.routed_up_bias = _parameter(up_bias_EF)
        self.routed_down = _parameter(down_HEF.transpose(0, 1))
        self.router = _linear(fused.router_weight_EH, fused.router_bias_E)
        mean = fused.expert_mean_EH
        self.expert_mean = None if mean is None else _parameter(mean)

    def route(self, x_TH: Tensor) -> Routing:
        """The router's choice for x_TH [T, H]."""
        return route_top_k(x_TH, self.router.weight, self.router.bias, top_k=self.top_k, gate=self.gate)

    def forward(self, x: Tensor) -> Tensor:
        """As `moe_ffn`: [..., H] to [..., H]."""
        x_TH = x.reshape(-1, x.shape[-1])
        down_HEF = self.routed_down.transpose(0, 1)
        y_TH = self.shared_down(F.gelu(self.shared_up(x_TH), approximate="tanh")) + routed_experts(
            x_TH, self.route(x_TH), self.routed_up, self.routed_up_bias, down_HEF, self.expert_mean
        )
        return y_TH.view(x.shape)

    @torch.no_grad()
    def fused(self) -> FusedFFN:
        """A copy of the weights in the file's layout; MoEFFN(fused) gives them back."""
        return FusedFFN(
            up_weight_NH=torch.cat([self.shared_up.weight, self.routed_up.flatten(0, 1)]),
            up_bias_N=torch.cat([self.shared_up.bias, self.routed_up_bias.flatten()]),
            down_weight_HN=torch.cat([self.shared_down.weight, self.routed_down.transpose(0, 1).flatten(1)], dim=1),
            down_bias_H=self.shared_down.bias.clone(),
            router_weight_EH=self.router.weight.clone(),
            router_bias_E=None if self.router.bias is None else self.router.bias.clone(),
            expert_mean_EH=None if self.expert_mean is None else self.expert_mean.clone(),
        )


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer

"""The MoE FFN (Sec. 3.1, Eq. 1-3): a shared expert that every token visits, and routed ones.

Shapes: T tokens, H hidden size, N = S + E F neurons, S shared neurons, E experts, F expert width, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import FFNLayout, Gate
from .experts import expert_down, expert_up, mean_compensation, plan_dispatch
from .layout import expert_views
from .routers import Routing
from .routers.capacity_routing import CapacityTensors, PoolRouting, route_by_threshold, route_pool, updated_threshold
from .routers.top_k import route_top_k


def routed_experts(
    x_TH: Tensor,
    routing: Routing,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    down_HEF: Tensor,
    expert_mean_EH: Tensor | None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The second term of Eq. 2, with mean compensation if there are means: y_TH, to be added to the shared expert's.

    `chunk_tokens` as in plan_dispatch.
    """
    plan = plan_dispatch(routing, x_TH, chunk_tokens)
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
    capacity: CapacityTensors | None = None  # None: a top-k router

    @classmethod
    def empty(
        cls,
        hidden_size: int,
        layout: FFNLayout,
        *,
        router_bias: bool,
        expert_mean: bool,
        predictor_width: int | None,
        device: str | torch.device = "meta",
    ) -> FusedFFN:
        """The right shapes and nothing in them. `predictor_width`: of a capacity router; None is a top-k router."""

        def tensor(*shape: int) -> Tensor:
            return torch.empty(*shape, device=device)

        experts, neurons = layout.experts, layout.neurons
        capacity = predictor_width and CapacityTensors(
            in_weight_DH=tensor(predictor_width, hidden_size),
            in_bias_D=tensor(predictor_width),
            out_weight_ED=tensor(experts, predictor_width),
            out_bias_E=tensor(experts),
            threshold_E=tensor(experts),
            scale_1=tensor(1),
        )
        return cls(
            up_weight_NH=tensor(neurons, hidden_size),
            up_bias_N=tensor(neurons),
            down_weight_HN=tensor(hidden_size, neurons),
            down_bias_H=tensor(hidden_size),
            router_weight_EH=tensor(experts, hidden_size),
            router_bias_E=tensor(experts) if router_bias else None,
            expert_mean_EH=tensor(experts, hidden_size) if expert_mean else None,
            capacity=capacity or None,
        )


def recomputed() -> bool:
    """Whether this forward is one that a checkpoint (non-reentrant) runs again, in the backward pass."""
    # Private, but the number that torch's own checkpoint goes by: no public function tells whether a backward pass runs.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RouterLinear(nn.Linear):
    """A router's weight and bias. Calling it gives them, since offloading libraries bring a layer in when it is called."""

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return self.weight, self.bias


class CapacityPredictor(nn.Module):
    """A capacity router's parameters (`in_layer`, `out_layer`) and buffers (`threshold` [E], `scale` [1]) beside W_g.

    `capacity` is for training: how many experts a token has on average; `factor` scales the thresholds otherwise.
    In training it keeps what the last pool was routed to, until `update_threshold`. A forward that is recomputed in the
    backward pass routes the same pool again and leaves what is kept as it is.
    """

    threshold: Tensor
    scale: Tensor

    def __init__(self, tensors: CapacityTensors, *, capacity: float) -> None:
        super().__init__()
        self.capacity, self.factor = capacity, 1.0
        self.in_layer = _linear(tensors.in_weight_DH, tensors.in_bias_D, RouterLinear)
        self.out_layer = _linear(tensors.out_weight_ED, tensors.out_bias_E, RouterLinear)
        self.register_buffer("threshold", tensors.threshold_E.detach().clone())
        self.register_buffer("scale", tensors.scale_1.detach().clone())
        self.pool_P: Tensor | None = None  # capacity.pool_of the batch's padding mask; None: all tokens
        self.pooled: PoolRouting | None = None

    def forward(self) -> CapacityTensors:
        (in_weight_DH, in_bias_D), (out_weight_ED, out_bias_E) = self.in_layer(), self.out_layer()
        return CapacityTensors(
            in_weight_DH=in_weight_DH,
            in_bias_D=in_bias_D,
            out_weight_ED=out_weight_ED,
            out_bias_E=out_bias_E,
            threshold_E=self.threshold,
            scale_1=self.scale,
        )

    def copy(self) -> CapacityTensors:
        tensors = self()
        return CapacityTensors(**{f.name: getattr(tensors, f.name).detach().clone() for f in fields(tensors)})

    def update_threshold(self, average: Callable[[Tensor], Tensor] | None = None) -> None:
        """Once a microbatch, after its backward pass, on every rank alike: see capacity.updated_threshold."""
        self.threshold.copy_(updated_threshold(self.threshold, self.pooled, average))
        self.pooled = None


class MoEFFN(nn.Module):
    """A MoE FFN with shared and routed weights apart, so that each can be trained or frozen by itself.

    Parameters: `shared_up` and `shared_down` (linear layers), `routed_up` [E, F, H], `routed_up_bias` [E, F],
    `routed_down` [E, H, F], `router` (a linear layer) and, if the file has them, `expert_mean` [E, H] and `capacity`
    (a CapacityPredictor), which then routes in place of `top_k`: by pool in training, else by its thresholds.

    experts_on  False leaves the shared expert alone: no router, no experts, no means (training's first stage)
    routing     in training what the last forward chose, for the losses, until it is set to None; None otherwise
    chunk_tokens  most tokens that the experts take at once; None lets plan_dispatch choose
    """

    routing: Routing | None
    chunk_tokens: int | None = None

    def __init__(
        self, fused: FusedFFN, *, layout: FFNLayout, gate: Gate, top_k: int, capacity: float | None = None
    ) -> None:
        """`capacity`: of the configuration's capacity router, where there is one; None is top_k."""
        super().__init__()
        self.layout, self.gate, self.top_k = layout, gate, top_k
        self.experts_on, self.routing = True, None
        shared = slice(0, layout.shared)
        up_EFH, up_bias_EF, down_HEF = expert_views(fused.up_weight_NH, fused.up_bias_N, fused.down_weight_HN, layout)
        self.shared_up = _linear(fused.up_weight_NH[shared], fused.up_bias_N[shared])
        self.shared_down = _linear(fused.down_weight_HN[:, shared], fused.down_bias_H)
        self.routed_up = _parameter(up_EFH)
        self.routed_up_bias = _parameter(up_bias_EF)
        self.routed_down = _parameter(down_HEF.transpose(0, 1))
        self.router = _linear(fused.router_weight_EH, fused.router_bias_E, RouterLinear)
        mean = fused.expert_mean_EH
        self.expert_mean = None if mean is None else _parameter(mean)
        self.capacity: CapacityPredictor | None = None
        if fused.capacity is not None:
            self.capacity = CapacityPredictor(fused.capacity, capacity=top_k if capacity is None else capacity)

    def route(self, x_TH: Tensor) -> Routing:
        """The router's choice for x_TH [T, H]. A capacity router in training remembers it as `capacity.pooled`."""
        (weight_EH, bias_E), capacity = self.router(), self.capacity
        if capacity is None:
            return route_top_k(x_TH, weight_EH, bias_E, top_k=self.top_k, gate=self.gate)
        tensors = capacity()
        if not self.training:
            return route_by_threshold(x_TH, weight_EH, bias_E, tensors, gate=self.gate, factor=capacity.factor)
        pooled = route_pool(
            x_TH, weight_EH, bias_E, tensors, gate=self.gate, capacity=capacity.capacity, pool_P=capacity.pool_P
        )
        if not recomputed():
            capacity.pooled = pooled
        return pooled.routing

    def forward(self, x: Tensor) -> Tensor:
        """As `moe_ffn`: [..., H] to [..., H]."""
        x_TH = x.reshape(-1, x.shape[-1])
        y_TH: Tensor = self.shared_down(F.gelu(self.shared_up(x_TH), approximate="tanh"))
        routing = None
        if self.experts_on:
            routing = self.route(x_TH)
            down_HEF = self.routed_down.transpose(0, 1)
            weights = (self.routed_up, self.routed_up_bias, down_HEF, self.expert_mean)
            y_TH = y_TH + routed_experts(x_TH, routing, *weights, self.chunk_tokens)
        if not (self.training and recomputed()):
            self.routing = routing if self.training else None
        return y_TH.view(x.shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights of nn.Linear's size; routers are never zero, means and thresholds are none."""
        hidden_size, width = self.routed_down.shape[1:]
        for layer in (self.shared_up, self.shared_down, self.router):
            layer.reset_parameters()
        for tensor in (self.routed_up, self.routed_up_bias):
            tensor.uniform_(-(hidden_size**-0.5), hidden_size**-0.5)
        self.routed_down.uniform_(-(width**-0.5), width**-0.5)
        if self.expert_mean is not None:
            self.expert_mean.zero_()
        if self.capacity is not None:
            self.capacity.in_layer.reset_parameters()
            self.capacity.out_layer.reset_parameters()
            self.capacity.threshold.fill_(0.5)
            self.capacity.scale.fill_(1)

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
            capacity=None if self.capacity is None else self.capacity.copy(),
        )


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def _linear(weight: Tensor, bias: Tensor | None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer

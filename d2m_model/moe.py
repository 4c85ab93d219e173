"""The MoE FFN (Sec. 3.1, Eq. 1-3): a shared expert for every token, and routed experts.

Shapes: T tokens, H hidden size, N = S + E F neurons, S shared neurons, E experts, F expert width, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import FFNLayout
from .experts import expert_down, expert_up, mean_compensation, plan_experts
from .layout import expert_views
from .routers import (
    TOP_K_ROUTER,
    Gate,
    RouterCompanion,
    RouterTensors,
    Routing,
    TokenRouter,
    TrainingCompanion,
    router_from_text,
    router_to_text,
)
from .routers.linear import RouterLinear, copied_linear, copied_parameter
from .routers.token_router import BIAS, WEIGHT
from .routers.top_k import route_top_k

EXPERT_MEAN = "expert_mean"  # tensor's name after the FFN's


def routed_experts(
    x_TH: Tensor,
    routing: Routing,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    down_HEF: Tensor,
    expert_mean_EH: Tensor | None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the second term of Eq. 2, [T, H], with mean compensation if there are means.

    `chunk_tokens` is that of plan_experts.
    """
    plan = plan_experts(routing, x_TH, up_EFH.shape[1], chunk_tokens)
    y_TH = expert_down(expert_up(x_TH, plan, up_EFH, up_bias_EF), plan, down_HEF)
    if expert_mean_EH is not None:
        y_TH = y_TH + mean_compensation(routing, expert_mean_EH, y_TH.dtype)
    return y_TH


# Inside a graph of torch.compile. A graph that reads the router's value is made again for each value, and after eight
# graphs torch stops compiling. So the value is a tensor on the host, which only this operator reads. Without gradients.
@torch.library.custom_op(
    "d2m::routed_experts",
    mutates_args=(),
    schema=(
        "(Tensor x_TH, str router, str[] names, Tensor[] tensors, Tensor value, str gate_mode, float gate_scale, "
        "Tensor up_EFH, Tensor up_bias_EF, Tensor down_HEF, Tensor? expert_mean_EH, int? chunk_tokens) -> Tensor"
    ),
)
def _routed_in_graph(
    x_TH: Tensor,
    router: str,
    names: list[str],
    tensors: list[Tensor],
    value: Tensor,
    gate_mode: str,
    gate_scale: float,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    down_HEF: Tensor,
    expert_mean_EH: Tensor | None,
    chunk_tokens: int | None,
) -> Tensor:
    gate = Gate(mode="normalised" if gate_mode == "normalised" else "sum", scale=gate_scale)
    by_name = dict(zip(names, tensors, strict=True))
    routing = router_from_text(router).route(x_TH, by_name, gate=gate, value=float(value))
    return routed_experts(x_TH, routing, up_EFH, up_bias_EF, down_HEF, expert_mean_EH, chunk_tokens)


@_routed_in_graph.register_fake
def _(x_TH: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x_TH, memory_format=torch.contiguous_format)


def shared_expert(x: Tensor, up_SH: Tensor, up_bias_S: Tensor, down_HS: Tensor, down_bias_H: Tensor) -> Tensor:
    """Return W2 gelu_tanh(W1 x + b1) + b2 (Eq. 1). b2 belongs to the shared expert."""
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
    """Apply Eq. 2 with a top-k router to x [..., H], on fused weights whose neurons are ordered as in `layout`.

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
    """One MoE FFN as the file holds it: weights of dense FLUX's shapes, neurons in the layout's order.

    `router` are the router's tensors by their names in the file after the FFN's.
    """

    up_weight_NH: Tensor
    up_bias_N: Tensor
    down_weight_HN: Tensor
    down_bias_H: Tensor
    router: RouterTensors
    expert_mean_EH: Tensor | None

    @classmethod
    def empty(cls, hidden_size: int, layout: FFNLayout, router: TokenRouter, optional: Container[str]) -> FusedFFN:
        """Tensors of the right shapes on the meta device. `optional` has the names of those that not every file has."""

        def tensor(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta")

        experts, neurons = layout.experts, layout.neurons
        shapes = router.shapes(hidden_size, experts)
        shapes |= {n: shape for n, shape in router.optional_shapes(hidden_size, experts).items() if n in optional}
        return cls(
            up_weight_NH=tensor(neurons, hidden_size),
            up_bias_N=tensor(neurons),
            down_weight_HN=tensor(hidden_size, neurons),
            down_bias_H=tensor(hidden_size),
            router={name: tensor(*shape) for name, shape in shapes.items()},
            expert_mean_EH=tensor(experts, hidden_size) if EXPERT_MEAN in optional else None,
        )


def recomputed() -> bool:
    """Return whether a (non-reentrant) checkpoint runs this forward again, in the backward pass."""
    # Private, but the number that torch's own checkpoint goes by: no public function tells whether a backward pass runs.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class MoEFFN(nn.Module):
    """A MoE FFN with separate shared and routed weights, so that each can be trained or frozen by itself.

    Parameters: `shared_up` and `shared_down` (linear layers), `routed_up` [E, F, H], `routed_up_bias` [E, F],
    `routed_down` [E, H, F], `router` (a linear layer, W_g) and, if the file has them, `expert_mean` [E, H] and the
    router's companion, which in training also routes.

    router_value  value of the router's setting, see TokenRouter.setting
    experts_on    False leaves the shared expert alone: no router, no experts, no means (training's first stage)
    routing       in training the choice of the last forward pass, for the losses, until it is set to None; else None
    chunk_tokens  largest number of tokens that the experts process at once; None lets plan_dispatch choose
    """

    routing: Routing | None
    chunk_tokens: int | None = None

    def __init__(
        self, fused: FusedFFN, *, layout: FFNLayout, gate: Gate, top_k: int, router: TokenRouter = TOP_K_ROUTER
    ) -> None:
        """`top_k` and `router` are the configuration's."""
        super().__init__()
        self.layout, self.gate = layout, gate
        self.token_router, self.router_text = router, router_to_text(router)
        with torch.inference_mode(False):
            self.value_in_graph = torch.zeros((), dtype=torch.float64, device="cpu")
        self.router_value = router.own_value(top_k)
        self.experts_on, self.routing = True, None
        shared = slice(0, layout.shared)
        up_EFH, up_bias_EF, down_HEF = expert_views(fused.up_weight_NH, fused.up_bias_N, fused.down_weight_HN, layout)
        self.shared_up = copied_linear(fused.up_weight_NH[shared], fused.up_bias_N[shared], nn.Linear)
        self.shared_down = copied_linear(fused.down_weight_HN[:, shared], fused.down_bias_H, nn.Linear)
        self.routed_up = copied_parameter(up_EFH)
        self.routed_up_bias = copied_parameter(up_bias_EF)
        self.routed_down = copied_parameter(down_HEF.transpose(0, 1))
        self.router = copied_linear(fused.router[WEIGHT], fused.router.get(BIAS), RouterLinear)
        mean = fused.expert_mean_EH
        self.expert_mean = None if mean is None else copied_parameter(mean)
        if router.companion_name is not None:
            self.add_module(router.companion_name, router.companion(fused.router))

    @property
    def router_value(self) -> float:
        return self._router_value

    @router_value.setter
    def router_value(self, value: float) -> None:
        self._router_value = value
        self.value_in_graph.fill_(value)

    @property
    def companion(self) -> RouterCompanion | None:
        """Parameters of the router beside W_g, if its kind has any."""
        name = self.token_router.companion_name
        return None if name is None else cast(RouterCompanion, self._modules[name])

    def route(self, x_TH: Tensor) -> Routing:
        """Choose experts for x_TH [T, H]. In training a companion that routes does it, and remembers its choice."""
        return self.begin_routing(x_TH)()

    def begin_routing(self, x_TH: Tensor) -> Callable[[], Routing]:
        """Start `route`, and return a function that returns its routing: see TokenRouter.begin."""
        tensors, companion = self._router_tensors(), self.companion
        if self.training and isinstance(companion, TrainingCompanion):
            routing = companion.route(x_TH, tensors, self.gate, remember=not recomputed())
            return lambda: routing
        return self.token_router.begin(x_TH, tensors, gate=self.gate, value=self.router_value)

    def _router_tensors(self) -> dict[str, Tensor]:
        """The router's tensors by their names in the file."""
        weight_EH, bias_E = self.router()
        tensors = {WEIGHT: weight_EH} if bias_E is None else {WEIGHT: weight_EH, BIAS: bias_E}
        return tensors if self.companion is None else tensors | self.companion()

    def _in_graph(self, device: str) -> bool:
        """Return whether this is the trace of a graph for inference, which is to serve every value of the router."""
        inference = not self.training and not torch.is_grad_enabled() and not torch.is_autocast_enabled(device)
        return inference and torch.compiler.is_compiling()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the FFN to x [..., H]."""
        x_TH = x.reshape(-1, x.shape[-1])
        in_graph = self._in_graph(x.device.type)
        # Ahead of the shared expert, which the device works on while the host waits for the choice. With gradients after
        # it: their sums round by the order in which the operators ran.
        early = self.experts_on and not in_graph and not torch.is_grad_enabled()
        end_routing = self.begin_routing(x_TH) if early else None
        y_TH: Tensor = self.shared_down(F.gelu(self.shared_up(x_TH), approximate="tanh"))
        routing = None
        if self.experts_on:
            weights = (self.routed_up, self.routed_up_bias, self.routed_down.transpose(0, 1), self.expert_mean)
            if in_graph:
                tensors, gate = self._router_tensors(), self.gate
                y_TH = y_TH + _routed_in_graph(
                    x_TH, self.router_text, list(tensors), list(tensors.values()), self.value_in_graph,
                    gate.mode, gate.scale, *weights, self.chunk_tokens,
                )  # fmt: skip
            else:
                routing = self.route(x_TH) if end_routing is None else end_routing()
                y_TH = y_TH + routed_experts(x_TH, routing, *weights, self.chunk_tokens)
        if not (self.training and recomputed()):
            self.routing = routing if self.training else None
        return y_TH.view(x.shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set initial weights as nn.Linear does. Routers are never zero; expert means are."""
        hidden_size, width = self.routed_down.shape[1:]
        for layer in (self.shared_up, self.shared_down, self.router):
            layer.reset_parameters()
        for tensor in (self.routed_up, self.routed_up_bias):
            tensor.uniform_(-(hidden_size**-0.5), hidden_size**-0.5)
        self.routed_down.uniform_(-(width**-0.5), width**-0.5)
        if self.expert_mean is not None:
            self.expert_mean.zero_()
        if self.companion is not None:
            self.companion.reset_parameters()

    @torch.no_grad()
    def fused(self) -> FusedFFN:
        """Return a copy of the weights in the file's layout. MoEFFN(fused) is the inverse."""
        return FusedFFN(
            up_weight_NH=torch.cat([self.shared_up.weight, self.routed_up.flatten(0, 1)]),
            up_bias_N=torch.cat([self.shared_up.bias, self.routed_up_bias.flatten()]),
            down_weight_HN=torch.cat([self.shared_down.weight, self.routed_down.transpose(0, 1).flatten(1)], dim=1),
            down_bias_H=self.shared_down.bias.clone(),
            router={name: tensor.clone() for name, tensor in self._router_tensors().items()},
            expert_mean_EH=None if self.expert_mean is None else self.expert_mean.clone(),
        )

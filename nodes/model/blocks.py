"""ComfyUI's own FLUX blocks with expert FFNs.

The modules, their names and their weights stay ComfyUI's: a FLUX-MoE's weights are a dense FLUX's, reordered
(see d2m_model/layout.py), and a router stands beside each pair of them. Only what a block does with the pair
changes: it runs ComfyUI's own forward on a view of itself (`BlockCall`) whose FFN is the routed one. What a call
needs to remember lives in that view and dies with it.

Shapes: B batch, T tokens, H hidden size, D predictor width, E experts, F expert width, S neurons of the shared expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...d2m_model.config import FFNLayout
from ...d2m_model.experts import Dispatch, expert_down, expert_up, mean_compensation, plan_dispatch
from ...d2m_model.routers import Routing
from ...d2m_model.routers.capacity_routing import CapacityTensors, route_by_threshold
from ...d2m_model.routers.top_k import route_top_k
from .custom_operators import GraphChoice, Handed, down_in_graph, up_in_graph
from .settings import Choice, FileChoice

# Weights


def cast(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Weight and bias of `linear` as ComfyUI casts them for x (patched, moved, dequantised once), and the token
    that comfy.ops.uncast_bias_weight wants after their last use."""
    weight, bias, token = comfy.ops.cast_bias_weight(linear, x, offloadable=True)
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    smoothing = getattr(linear, "pre_quant_scale", None)  # of the layer's input; here of the columns that meet it
    if smoothing is not None:
        weight = weight * comfy.model_management.cast_to_device(smoothing, weight.device, weight.dtype)
    return weight, bias, token


def router_linear(weight: Tensor, bias: bool, device: torch.device | None) -> nn.Linear:
    """Room for `weight`, in the dtype of its file: whatever the model's weights are cast to, a choice does not depend
    on it. Not of the model's own operations, which may want to quantise it."""
    found: nn.Linear = comfy.ops.manual_cast.Linear(
        weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype, device=device
    )
    return found


def cast_router(router: nn.Linear, device: torch.device) -> tuple[Tensor, Tensor | None, Any]:
    """As `cast`, in the router's own dtype."""
    dtype = router.weight.dtype
    found: tuple[Tensor, Tensor | None, Any] = comfy.ops.cast_bias_weight(
        router, dtype=dtype, bias_dtype=dtype, device=device, offloadable=True
    )
    return found


# Routed FFNs


@dataclass(slots=True)
class Routed:
    """What W1's side hands to W2's, within one call."""

    routing: Routing
    plan: Dispatch
    hidden_AF: Tensor


class CastRouter(NamedTuple):
    """What a FFN's router computes with, cast for one call; `casts` are what `ExpertLayer.uncast_router` wants."""

    weight_EH: Tensor
    bias_E: Tensor | None
    capacity: CapacityTensors | None
    casts: list[tuple[nn.Linear, Tensor, Tensor | None, Any]]


class CapacityRouter(nn.Module):
    """What a capacity router has beside W_g; `threshold` is its FFN's, by the file's names."""

    scale: Tensor

    def __init__(self, stored: Mapping[str, Tensor], name: str, device: torch.device | None) -> None:
        super().__init__()
        self.in_layer = router_linear(stored[f"{name}.capacity.in_layer.weight"], True, device)
        self.out_layer = router_linear(stored[f"{name}.capacity.out_layer.weight"], True, device)
        self.register_buffer("scale", torch.empty_like(stored[f"{name}.capacity.scale"], device=device))


class ExpertLayer(nn.Module):
    """What the owner of a routed FFN has besides the modules of its dense kind."""

    name: str  # of the FFN, in the file
    row: Tensor  # its place among the file's FFNs; a tensor, for graphs that serve several blocks. Always on the host.
    layout: FFNLayout
    file: FileChoice
    router: nn.Linear
    capacity: CapacityRouter | None
    neuron_order: Tensor
    expert_mean: Tensor | None
    threshold: Tensor | None

    def add_router(
        self,
        layout: FFNLayout,
        file: FileChoice,
        stored: Mapping[str, Tensor],
        name: str,
        row: int,
        device: torch.device | None,
    ) -> None:
        """Make room for the tensors of FFN `name`, the row-th of the file, in the dtypes of their file."""
        self.name, self.layout, self.file = name, layout, file
        self.row = torch.tensor(row, device="cpu")
        self.router = router_linear(stored[f"{name}.router.weight"], f"{name}.router.bias" in stored, device)
        self.capacity = CapacityRouter(stored, name, device) if f"{name}.threshold" in stored else None
        for buffer in ("neuron_order", "expert_mean", "threshold"):
            like = stored.get(f"{name}.{buffer}")
            self.register_buffer(buffer, None if like is None else torch.empty_like(like, device=device))

    def cast_router(self, device: torch.device) -> CastRouter:
        capacity = self.capacity
        layers = [self.router, *((capacity.in_layer, capacity.out_layer) if capacity is not None else ())]
        casts = [(layer, *cast_router(layer, device)) for layer in layers]
        tensors = None
        if capacity is not None:
            (_, in_weight_DH, in_bias_D, _), (_, out_weight_ED, out_bias_E, _) = casts[1:]
            assert in_bias_D is not None
            assert out_bias_E is not None
            assert self.threshold is not None
            tensors = CapacityTensors(
                in_weight_DH=in_weight_DH,
                in_bias_D=in_bias_D,
                out_weight_ED=out_weight_ED,
                out_bias_E=out_bias_E,
                threshold_E=self.threshold.to(device),
                scale_1=capacity.scale.to(device),
            )
        _, weight_EH, bias_E, _ = casts[0]
        return CastRouter(weight_EH, bias_E, tensors, casts)

    def uncast_router(self, router: CastRouter) -> None:
        for layer, weight, bias, token in router.casts:
            comfy.ops.uncast_bias_weight(layer, weight, bias, token)

    def route(self, x_BTH: Tensor, choice: Choice) -> Routing:
        x_TH = x_BTH.flatten(0, -2)
        router = self.cast_router(x_TH.device)
        weights = (router.weight_EH, router.bias_E)
        routing: Routing
        if router.capacity is not None:
            routing = route_by_threshold(x_TH, *weights, router.capacity, gate=choice.gate, factor=choice.capacity)
        else:
            routing = route_top_k(x_TH, *weights, top_k=choice.top_k, gate=choice.gate)
        self.uncast_router(router)
        if choice.trace is not None:
            choice.trace.experts(self.name, routing, batch=x_BTH.shape[0], gate=choice.gate)
        if choice.mask is not None and self.name in choice.mask:
            routing = routing.weighed(choice.mask[self.name].to(x_TH.device))
        return routing

    def up(self, linear: nn.Module, x_BTH: Tensor, rows: int, choice: Choice) -> tuple[Tensor, Routed | Handed]:
        """W1: the first `rows` outputs for every token, and the chosen experts' hidden activations beyond them."""
        # Without gradients alone: the operators of custom_operators.py have none.
        if choice.graph is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return self._up_in_graph(linear, x_BTH, rows, choice.graph)
        return self._up(linear, x_BTH, rows, choice)

    def down(self, linear: nn.Module, x_BTN: Tensor, routed: Routed | Handed) -> Tensor:
        """W2: its first columns on x, for every token, plus the chosen experts' outputs: [B, T, H]."""
        if isinstance(routed, Handed):
            return self._down_in_graph(linear, x_BTN, routed)
        return self._down(linear, x_BTN, routed)

    def _up(self, linear: nn.Module, x_BTH: Tensor, rows: int, choice: Choice) -> tuple[Tensor, Routed]:
        x_TH = x_BTH.flatten(0, -2)
        routing = self.route(x_BTH, choice)
        plan = plan_dispatch(routing, x_TH)
        weight, bias, token = cast(linear, x_BTH)
        y_BTN = F.linear(x_BTH, weight[:rows], bias[:rows])
        experts = (self.layout.experts, self.layout.width)
        hidden_AF = expert_up(x_TH, plan, weight[rows:].unflatten(0, experts), bias[rows:].unflatten(0, experts))
        comfy.ops.uncast_bias_weight(linear, weight, bias, token)
        return y_BTN, Routed(routing, plan, hidden_AF)

    def _down(self, linear: nn.Module, x_BTN: Tensor, routed: Routed) -> Tensor:
        columns = x_BTN.shape[-1]
        weight, bias, token = cast(linear, x_BTN)
        y_BTH = F.linear(x_BTN, weight[:, :columns], bias)
        experts = (self.layout.experts, self.layout.width)
        y_TH = expert_down(routed.hidden_AF, routed.plan, weight[:, columns:].unflatten(1, experts))
        comfy.ops.uncast_bias_weight(linear, weight, bias, token)
        if self.expert_mean is not None:
            y_TH = y_TH + mean_compensation(routed.routing, self.expert_mean.to(y_TH.device), y_TH.dtype)
        return y_BTH + y_TH.view_as(y_BTH)

    def _up_in_graph(self, linear: nn.Module, x_BTH: Tensor, rows: int, choice: GraphChoice) -> tuple[Tensor, Handed]:
        router = self.cast_router(x_BTH.device)
        weight, bias, token = cast(linear, x_BTH)
        y_BTN = F.linear(x_BTH, weight[:rows], bias[:rows])
        experts = (self.layout.experts, self.layout.width)
        up_EFH, up_bias_EF = weight[rows:].unflatten(0, experts), bias[rows:].unflatten(0, experts)
        x_TH = x_BTH.flatten(0, -2)
        handed = up_in_graph(
            x_TH, router.weight_EH, router.bias_E, router.capacity, choice, self.row, up_EFH, up_bias_EF
        )
        self.uncast_router(router)
        comfy.ops.uncast_bias_weight(linear, weight, bias, token)
        return y_BTN, handed

    def _down_in_graph(self, linear: nn.Module, x_BTN: Tensor, handed: Handed) -> Tensor:
        columns = x_BTN.shape[-1]
        weight, bias, token = cast(linear, x_BTN)
        y_BTH = F.linear(x_BTN, weight[:, :columns], bias)
        experts = (self.layout.experts, self.layout.width)
        mean_EH = None if self.expert_mean is None else self.expert_mean.to(x_BTN.device)
        y_TH = down_in_graph(handed, weight[:, columns:].unflatten(1, experts), mean_EH)
        comfy.ops.uncast_bias_weight(linear, weight, bias, token)
        return y_BTH + y_TH.view_as(y_BTH)


class ExpertFFN(ExpertLayer, nn.Sequential):
    """A double block's img_mlp or txt_mlp. Its children are those of the nn.Sequential it replaces, and its router's."""

    def forward(self, x_BTH: Tensor, choice: Choice | None = None) -> Tensor:
        """`choice`: None is the file's own."""
        shared_BTS, routed = self.up(self[0], x_BTH, self.layout.shared, choice or self.file.under(None))
        return self.down(self[2], self[1](shared_BTS), routed)


# Blocks


class BlockCall:
    """A block as one call of its forward sees it: the block, but for what a subclass puts in place of it."""

    def __init__(self, block: Any, choice: Choice) -> None:
        self.block, self.choice = block, choice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class DoubleCall(BlockCall):
    def img_mlp(self, x: Tensor) -> Tensor:
        return self.run(self.block.img_mlp, x)

    def txt_mlp(self, x: Tensor) -> Tensor:
        return self.run(self.block.txt_mlp, x)

    def run(self, mlp: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = mlp(x, self.choice) if isinstance(mlp, ExpertFFN) else mlp(x)
        return found


class SingleCall(BlockCall):
    """linear1 gives qkv and the shared expert's part of the MLP, so FLUX's own block runs with a thinner MLP;
    linear2 adds the routed experts to it."""

    block: SingleExpertBlock

    @property
    def mlp_hidden_dim_first(self) -> int:
        return self.block.layout.shared

    def linear1(self, x: Tensor) -> Tensor:
        block = self.block
        rows = 3 * block.hidden_size + block.layout.shared
        dense, self.routed = block.up(block.linear1, x, rows, self.choice)
        return dense

    def linear2(self, x: Tensor) -> Tensor:
        return self.block.down(self.block.linear2, x, self.routed)


class DoubleExpertBlock(DoubleStreamBlock):
    file: FileChoice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.file.under(kwargs.get("transformer_options")), *args, **kwargs)

    def run(self, choice: Choice, *args: Any, **kwargs: Any) -> Any:
        return DoubleStreamBlock.forward(DoubleCall(self, choice), *args, **kwargs)


class SingleExpertBlock(ExpertLayer, SingleStreamBlock):
    hidden_size: int
    linear1: nn.Linear
    linear2: nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.file.under(kwargs.get("transformer_options")), *args, **kwargs)

    def run(self, choice: Choice, *args: Any, **kwargs: Any) -> Any:
        return SingleStreamBlock.forward(SingleCall(self, choice), *args, **kwargs)

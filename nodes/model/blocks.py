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
from .custom_operators import Handed, down_in_graph, up_in_graph
from .settings import Choice, FileChoice, GraphChoice

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
    """A router's tensors by their names in the file, cast for one call; `ExpertLayer.uncast_router` takes `casts`."""

    tensors: dict[str, Tensor]
    casts: list[tuple[nn.Linear, Tensor, Tensor | None, Any]]


class ExpertLayer(nn.Module):
    """What the owner of a routed FFN has besides the modules of its dense kind."""

    name: str  # of the FFN, in the file
    row: Tensor  # its place among the file's FFNs; a tensor, for graphs that serve several blocks. Always on the host.
    layout: FFNLayout
    file: FileChoice
    router_layers: tuple[str, ...]  # the router's linear layers and other tensors, by their names in the file
    router_buffers: tuple[str, ...]
    neuron_order: Tensor
    expert_mean: Tensor | None

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
        for buffer in ("neuron_order", "expert_mean"):
            like = stored.get(f"{name}.{buffer}")
            self.register_buffer(buffer, None if like is None else torch.empty_like(like, device=device))
        required = file.router.shapes(0, 0)  # of which only the names are read
        weights = [tensor for tensor in required if tensor.endswith(".weight")]
        self.router_layers = tuple(tensor.removesuffix(".weight") for tensor in weights)
        biases = {f"{layer}.bias" for layer in self.router_layers}
        self.router_buffers = tuple(tensor for tensor in required if tensor not in weights and tensor not in biases)
        for layer in self.router_layers:
            owner, attribute = self._owner(layer)
            bias = f"{name}.{layer}.bias" in stored
            owner.add_module(attribute, router_linear(stored[f"{name}.{layer}.weight"], bias, device))
        for buffer in self.router_buffers:
            owner, attribute = self._owner(buffer)
            owner.register_buffer(attribute, torch.empty_like(stored[f"{name}.{buffer}"], device=device))

    def _owner(self, tensor: str) -> tuple[nn.Module, str]:
        """The module that holds `tensor` of the router, made if it is not there, and the tensor's name in it."""
        owner: nn.Module = self
        *path, attribute = tensor.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, attribute

    def cast_router(self, device: torch.device) -> CastRouter:
        tensors, casts = {}, []
        for name in self.router_layers:
            layer: Any = self.get_submodule(name)
            weight, bias, token = cast_router(layer, device)
            tensors[f"{name}.weight"] = weight
            if bias is not None:
                tensors[f"{name}.bias"] = bias
            casts.append((layer, weight, bias, token))
        for name in self.router_buffers:
            tensors[name] = self.get_buffer(name).to(device)
        return CastRouter(tensors, casts)

    def uncast_router(self, router: CastRouter) -> None:
        for layer, weight, bias, token in router.casts:
            comfy.ops.uncast_bias_weight(layer, weight, bias, token)

    def route(self, x_BTH: Tensor, choice: Choice) -> Routing:
        x_TH = x_BTH.flatten(0, -2)
        router = self.cast_router(x_TH.device)
        routing = self.file.router.route(x_TH, router.tensors, gate=choice.gate, value=choice.value)
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
        handed = up_in_graph(x_TH, self.file.router_text, router.tensors, choice, self.row, up_EFH, up_bias_EF)
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

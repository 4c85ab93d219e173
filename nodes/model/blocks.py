"""ComfyUI's own FLUX blocks with expert FFNs.

Modules, their names and their weights stay ComfyUI's: a FLUX-MoE has a dense FLUX's weights, reordered (see
d2m_model/layout.py), and a router beside each pair of FFN weights. Only the use of this pair changes: a block runs
ComfyUI's own forward on a view of itself (`BlockCall`) whose FFN is the routed one. The view lives for one call and
holds what that call has to remember.

Shapes: B batch, T tokens, H hidden size, D predictor width, E experts, F expert width, S neurons of the shared expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor, nn

from ...d2m_model.config import FFNLayout
from ...d2m_model.experts import (
    Dispatch,
    EveryExpert,
    expert_down,
    expert_up,
    mean_compensation,
    plan_dispatch,
    plan_experts,
)
from ...d2m_model.kernels.choice import has_kernels
from ...d2m_model.routers import Routing
from ...d2m_model.tensor_file import FLOAT8
from .call_arguments import CallArguments
from .custom_operators import Handed, down_in_graph, up_in_graph
from .settings import CallSettings, FileSettings, GraphSettings
from .weights import CastLinear, cast_linear, is_float8, router_linear, router_weights

# Routed FFNs


@dataclass(slots=True)
class Routed:
    """Results of W1's side that W2's side needs, within one call."""

    routing: Routing
    plan: Dispatch | EveryExpert
    hidden_AF: Tensor


class ExpertLayer(nn.Module):
    """Mixin for the module that owns a routed FFN: a router and its tensors beside the dense modules."""

    name: str  # the FFN's name in the file
    row: Tensor  # the FFN's index among the file's; a tensor on the host, because one graph serves several blocks
    layout: FFNLayout
    file: FileSettings
    router_layers: tuple[str, ...]  # names of the router's linear layers in the file
    router_buffers: tuple[str, ...]  # names of its other tensors
    neuron_order: Tensor
    expert_mean: Tensor | None

    def add_router(
        self,
        layout: FFNLayout,
        file: FileSettings,
        stored: Mapping[str, Tensor],
        name: str,
        row: int,
        device: torch.device | None,
    ) -> None:
        """Make empty tensors for FFN `name`, the row-th of the file, in the dtypes of the file."""
        self.name, self.layout, self.file = name, layout, file
        self.row = torch.tensor(row, device="cpu")
        for buffer in ("neuron_order", "expert_mean"):
            like = stored.get(f"{name}.{buffer}")
            self.register_buffer(buffer, None if like is None else torch.empty_like(like, device=device))
        required = file.router.shapes(0, 0)  # only the names are used
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
        """Return the module that holds a tensor of the router, and the tensor's name in it. Makes missing modules."""
        owner: nn.Module = self
        *path, attribute = tensor.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, attribute

    def keep_buffers_on(self, device: torch.device) -> None:
        """Move the router's buffers and the expert means to `device`, where they stay.

        ComfyUI's partial loading leaves them on the host, which would wait for a copy of them in every call.
        """
        for name in (*self.router_buffers, "expert_mean"):
            owner, attribute = self._owner(name)
            buffer = owner._buffers[attribute]
            if buffer is not None and buffer.device != device:
                with torch.inference_mode(False):  # for training, which cannot use tensors of inference mode
                    setattr(owner, attribute, buffer.to(device))

    def router_tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Return the router's tensors on `device`, by their names in the file."""
        tensors = {name: self.get_buffer(name).to(device) for name in self.router_buffers}
        for name in self.router_layers:
            layer: Any = self.get_submodule(name)
            weight, bias = router_weights(layer, device)
            tensors[f"{name}.weight"] = weight
            if bias is not None:
                tensors[f"{name}.bias"] = bias
        return tensors

    def begin_routing(self, x_BTH: Tensor, settings: CallSettings) -> Callable[[], Routing]:
        """Start to route under `settings`, and return a function that returns the routing: see TokenRouter.begin."""
        x_TH = x_BTH.flatten(0, -2)
        tensors = self.router_tensors(x_TH.device)
        value = settings.values.get(self.name, settings.value)
        chosen = self.file.router.begin(x_TH, tensors, gate=settings.gate, value=value)

        def routing() -> Routing:
            routing = chosen()
            if settings.trace is not None:
                settings.trace.experts(self.name, routing, batch=x_BTH.shape[0], gate=settings.gate)
            if settings.mask is not None and self.name in settings.mask:
                routing = routing.weighed(settings.mask[self.name].to(x_TH.device))
            return routing

        return routing

    def up(self, linear: nn.Module, x_BTH: Tensor, rows: int, settings: CallSettings) -> tuple[Tensor, Routed | Handed]:
        """Apply W1: its first `rows` outputs for every token, and the hidden activations of the chosen experts."""
        # Only without gradients, which the operators of custom_operators.py do not have.
        if settings.graph is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return self._up_in_graph(linear, x_BTH, rows, settings.graph)
        return self._up(linear, x_BTH, rows, settings)

    def down(self, linear: nn.Module, x_BTN: Tensor, routed: Routed | Handed) -> Tensor:
        """Apply W2: its first columns to x, for every token, plus the outputs of the chosen experts: [B, T, H]."""
        if isinstance(routed, Handed):
            return self._down_in_graph(linear, x_BTN, routed)
        return self._down(linear, x_BTN, routed)

    def _up(self, linear: nn.Module, x_BTH: Tensor, rows: int, settings: CallSettings) -> tuple[Tensor, Routed]:
        x_TH = x_BTH.flatten(0, -2)
        end_routing = self.begin_routing(x_BTH, settings)
        keep_float8 = takes_float8(x_TH) and is_float8(linear)
        cast = cast_linear(linear, x_BTH, 0, rows, keep_float8=keep_float8)
        y_BTN = cast.product(x_BTH, cast.bias[:rows])  # the device works on it while the host waits for the choice
        routing = end_routing()
        # The product of every expert for every token would need the whole weight converted.
        plan = plan_dispatch(routing, x_TH) if keep_float8 else plan_experts(routing, x_TH, self.layout.width)
        hidden_AF = expert_up(x_TH, plan, *self._up_experts(cast, rows), cast.scale)
        cast.release()
        return y_BTN, Routed(routing, plan, hidden_AF)

    def _down(self, linear: nn.Module, x_BTN: Tensor, routed: Routed) -> Tensor:
        keep_float8 = isinstance(routed.plan, Dispatch) and takes_float8(x_BTN)
        cast = cast_linear(linear, x_BTN, 1, x_BTN.shape[-1], keep_float8=keep_float8)
        y_BTH = cast.product(x_BTN, cast.bias)
        y_TH = expert_down(routed.hidden_AF, routed.plan, self._down_experts(cast), cast.scale)
        cast.release()
        if self.expert_mean is not None:
            y_TH = y_TH + mean_compensation(routed.routing, self.expert_mean.to(y_TH.device), y_TH.dtype)
        return y_BTH + y_TH.view_as(y_BTH)

    def _up_in_graph(
        self, linear: nn.Module, x_BTH: Tensor, rows: int, settings: GraphSettings
    ) -> tuple[Tensor, Handed]:
        tensors = self.router_tensors(x_BTH.device)
        cast = cast_linear(linear, x_BTH, 0, rows, keep_float8=_float8_in_graph(linear, x_BTH))
        y_BTN = cast.product(x_BTH, cast.bias[:rows])
        x_TH, experts = x_BTH.flatten(0, -2), self._up_experts(cast, rows)
        handed = up_in_graph(x_TH, self.file.router_text, tensors, settings, self.row, *experts, cast.scale)
        cast.release()
        return y_BTN, handed

    def _down_in_graph(self, linear: nn.Module, x_BTN: Tensor, handed: Handed) -> Tensor:
        cast = cast_linear(linear, x_BTN, 1, x_BTN.shape[-1], keep_float8=_float8_in_graph(linear, x_BTN))
        y_BTH = cast.product(x_BTN, cast.bias)
        mean_EH = None if self.expert_mean is None else self.expert_mean.to(x_BTN.device)
        y_TH = down_in_graph(handed, self._down_experts(cast), cast.scale, mean_EH)
        cast.release()
        return y_BTH + y_TH.view_as(y_BTH)

    def _up_experts(self, cast: CastLinear, first_row: int) -> tuple[Tensor, Tensor]:
        """Return W1 [E, F, H] and its bias [E, F] of the experts, as views."""
        experts = (self.layout.experts, self.layout.width)
        return cast.experts.unflatten(0, experts), cast.bias[first_row:].unflatten(0, experts)

    def _down_experts(self, cast: CastLinear) -> Tensor:
        """Return W2 [H, E, F] of the experts, as a view."""
        return cast.experts.unflatten(1, (self.layout.experts, self.layout.width))


def takes_float8(x: Tensor) -> bool:
    """Return whether the products of sorted rows of x take weights in float8 as they are stored."""
    return has_kernels(x) and not torch.is_grad_enabled()


def _float8_in_graph(linear: Any, x: Tensor) -> bool:
    """Return whether a graph hands a weight on in float8: one without a scale, since a QuantizedTensor breaks graphs.

    Only the operators of custom_operators.py, when the graph runs, know whether kernels take it.
    """
    return x.is_cuda and linear.weight.dtype in FLOAT8


class ExpertFFN(ExpertLayer, nn.Sequential):
    """A double block's img_mlp or txt_mlp. Its children are those of the nn.Sequential it replaces, and its router."""

    def forward(self, x_BTH: Tensor, settings: CallSettings | None = None) -> Tensor:
        """Run the FFN. `settings` None is the file's own."""
        shared_BTS, routed = self.up(self[0], x_BTH, self.layout.shared, settings or self.file.under(None))
        return self.down(self[2], self[1](shared_BTS), routed)


# Blocks


class BlockCall:
    """View of a block for one call of its forward: the block, except for the modules that a subclass replaces."""

    def __init__(self, block: Any, settings: CallSettings) -> None:
        self.block, self.settings = block, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class DoubleCall(BlockCall):
    def img_mlp(self, x: Tensor) -> Tensor:
        return self.run(self.block.img_mlp, x)

    def txt_mlp(self, x: Tensor) -> Tensor:
        return self.run(self.block.txt_mlp, x)

    def run(self, mlp: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = mlp(x, self.settings) if isinstance(mlp, ExpertFFN) else mlp(x)
        return y


class SingleCall(BlockCall):
    """View of a single block: linear1 returns qkv and the shared expert's part of the MLP, so that FLUX's own block runs
    with a narrower MLP; linear2 adds the routed experts."""

    block: SingleExpertBlock

    @property
    def mlp_hidden_dim_first(self) -> int:
        return self.block.layout.shared

    def linear1(self, x: Tensor) -> Tensor:
        block = self.block
        rows = 3 * block.hidden_size + block.layout.shared
        dense, self.routed = block.up(block.linear1, x, rows, self.settings)
        return dense

    def linear2(self, x: Tensor) -> Tensor:
        return self.block.down(self.block.linear2, x, self.routed)


_OPTIONS = "transformer_options"


def given_options(stock: type[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the transformer_options in a call of a stock block's forward; None if left out."""
    options: Mapping[str, Any] | None = CallArguments(args, kwargs).find(_OPTIONS_INDEX[stock], _OPTIONS)
    return options


# Index of transformer_options among the arguments of the stock blocks' forward, without self.
_OPTIONS_INDEX = {
    block: list(inspect.signature(block.forward).parameters).index(_OPTIONS) - 1
    for block in (DoubleStreamBlock, SingleStreamBlock)
}


class DoubleExpertBlock(DoubleStreamBlock):
    file: FileSettings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.file.under(given_options(DoubleStreamBlock, args, kwargs)), *args, **kwargs)

    def run(self, settings: CallSettings, *args: Any, **kwargs: Any) -> Any:
        return DoubleStreamBlock.forward(DoubleCall(self, settings), *args, **kwargs)


class SingleExpertBlock(ExpertLayer, SingleStreamBlock):
    hidden_size: int
    linear1: nn.Linear
    linear2: nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.file.under(given_options(SingleStreamBlock, args, kwargs)), *args, **kwargs)

    def run(self, settings: CallSettings, *args: Any, **kwargs: Any) -> Any:
        return SingleStreamBlock.forward(SingleCall(self, settings), *args, **kwargs)

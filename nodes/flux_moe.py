"""ComfyUI's own FLUX with expert FFNs.

The modules, their names and their weights stay ComfyUI's: a FLUX-MoE's weights are a dense FLUX's, reordered
(see d2m_model/layout.py), and a router stands beside each pair of them. Only what a block does with the pair
changes: it runs ComfyUI's own forward on a view of itself (`BlockCall`) whose FFN is the routed one. What a call
needs to remember lives in that view and dies with it.

Shapes: B batch, T tokens, H hidden size, E experts, F expert width, S neurons of the shared expert.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.flux.model import Flux
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..d2m_model.checkpoint import CONFIG_KEY, CheckpointError, check_state_dict
from ..d2m_model.config import FFNLayout, FluxMoEConfig, Gate
from ..d2m_model.experts import Dispatch, expert_down, expert_up, mean_compensation, plan_dispatch
from ..d2m_model.layout import neuron_axis
from ..d2m_model.routers import Routing, route_top_k
from ..d2m_model.tensor_file import ALIGNMENT
from .compressed import compress_modulations, modulations

OPTIONS_KEY = "d2m"  # of transformer_options: {"top_k": int, "gate": "sum" | "normalised"}, each optional


Choice = tuple[int, Gate]  # top_k and gate of one call


# Routed FFNs


@dataclass(kw_only=True, slots=True, frozen=True)
class MoE:
    """How one FFN is routed: its layout, and what the file says of top_k and gate."""

    layout: FFNLayout
    top_k: int
    gates: Mapping[str, Gate]  # by mode
    gate: str  # the file's own mode

    def choice(self, transformer_options: Mapping[str, Any] | None) -> Choice:
        """That of the sampled clone, or else the file's."""
        options = (transformer_options or {}).get(OPTIONS_KEY) or {}
        return options.get("top_k", self.top_k), self.gates[options.get("gate", self.gate)]


@dataclass(slots=True)
class Routed:
    """What W1's side hands to W2's, within one call."""

    routing: Routing
    plan: Dispatch
    hidden_AF: Tensor


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


class ExpertLayer(nn.Module):
    """What the owner of a routed FFN has besides the modules of its dense kind."""

    moe: MoE
    router: nn.Linear
    neuron_order: Tensor
    expert_mean: Tensor | None

    def add_router(self, moe: MoE, stored: Mapping[str, Tensor], name: str, device: torch.device | None) -> None:
        """Make room for the tensors of FFN `name`, in the dtypes of their file: whatever the weights are cast to,
        the choice of experts does not depend on it."""
        self.moe = moe
        weight_EH, bias = stored[f"{name}.router.weight"], f"{name}.router.bias" in stored
        # Not of the model's own operations, which may want to quantise it.
        self.router = comfy.ops.manual_cast.Linear(
            weight_EH.shape[1], weight_EH.shape[0], bias=bias, dtype=weight_EH.dtype, device=device
        )
        for buffer in ("neuron_order", "expert_mean"):
            like = stored.get(f"{name}.{buffer}")
            self.register_buffer(buffer, None if like is None else torch.empty_like(like, device=device))

    def route(self, x_TH: Tensor, top_k: int, gate: Gate) -> Routing:
        router, dtype = self.router, self.router.weight.dtype
        weight_EH, bias_E, token = comfy.ops.cast_bias_weight(
            router, dtype=dtype, bias_dtype=dtype, device=x_TH.device, offloadable=True
        )
        routing = route_top_k(x_TH, weight_EH, bias_E, top_k=top_k, gate=gate)
        comfy.ops.uncast_bias_weight(router, weight_EH, bias_E, token)
        return routing

    def up(self, linear: nn.Module, x_BTH: Tensor, rows: int, choice: Choice) -> tuple[Tensor, Routed]:
        """W1: the first `rows` outputs for every token, and the chosen experts' hidden activations beyond them."""
        x_TH = x_BTH.flatten(0, -2)
        routing = self.route(x_TH, *choice)
        plan = plan_dispatch(routing, x_TH)
        weight, bias, token = cast(linear, x_BTH)
        y_BTN = F.linear(x_BTH, weight[:rows], bias[:rows])
        experts = (self.moe.layout.experts, self.moe.layout.width)
        hidden_AF = expert_up(x_TH, plan, weight[rows:].unflatten(0, experts), bias[rows:].unflatten(0, experts))
        comfy.ops.uncast_bias_weight(linear, weight, bias, token)
        return y_BTN, Routed(routing, plan, hidden_AF)

    def down(self, linear: nn.Module, x_BTN: Tensor, routed: Routed) -> Tensor:
        """W2: its first columns on x, for every token, plus the chosen experts' outputs: [B, T, H]."""
        columns = x_BTN.shape[-1]
        weight, bias, token = cast(linear, x_BTN)
        y_BTH = F.linear(x_BTN, weight[:, :columns], bias)
        experts = (self.moe.layout.experts, self.moe.layout.width)
        y_TH = expert_down(routed.hidden_AF, routed.plan, weight[:, columns:].unflatten(1, experts))
        comfy.ops.uncast_bias_weight(linear, weight, bias, token)
        if self.expert_mean is not None:
            y_TH = y_TH + mean_compensation(routed.routing, self.expert_mean.to(y_TH.device), y_TH.dtype)
        return y_BTH + y_TH.view_as(y_BTH)


# Blocks


class ExpertFFN(ExpertLayer, nn.Sequential):
    """A double block's img_mlp or txt_mlp. Its children are those of the nn.Sequential it replaces, and a router."""

    def forward(self, x_BTH: Tensor, choice: Choice | None = None) -> Tensor:
        """`choice`: None is the file's own."""
        shared_BTS, routed = self.up(self[0], x_BTH, self.moe.layout.shared, choice or self.moe.choice(None))
        return self.down(self[2], self[1](shared_BTS), routed)


class BlockCall:
    """A block as one call of its forward sees it: the block, but for what a subclass puts in place of it."""

    def __init__(self, block: Any, transformer_options: Mapping[str, Any] | None) -> None:
        self.block, self.options = block, transformer_options

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class DoubleCall(BlockCall):
    def img_mlp(self, x: Tensor) -> Tensor:
        return self.run(self.block.img_mlp, x)

    def txt_mlp(self, x: Tensor) -> Tensor:
        return self.run(self.block.txt_mlp, x)

    def run(self, mlp: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = mlp(x, mlp.moe.choice(self.options)) if isinstance(mlp, ExpertFFN) else mlp(x)
        return found


class SingleCall(BlockCall):
    """linear1 gives qkv and the shared expert's part of the MLP, so FLUX's own block runs with a thinner MLP;
    linear2 adds the routed experts to it."""

    block: SingleExpertBlock

    @property
    def mlp_hidden_dim_first(self) -> int:
        return self.block.moe.layout.shared

    def linear1(self, x: Tensor) -> Tensor:
        block = self.block
        rows = 3 * block.hidden_size + block.moe.layout.shared
        dense, self.routed = block.up(block.linear1, x, rows, block.moe.choice(self.options))
        return dense

    def linear2(self, x: Tensor) -> Tensor:
        return self.block.down(self.block.linear2, x, self.routed)


class DoubleExpertBlock(DoubleStreamBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return DoubleStreamBlock.forward(DoubleCall(self, kwargs.get("transformer_options")), *args, **kwargs)


class SingleExpertBlock(ExpertLayer, SingleStreamBlock):
    hidden_size: int
    linear1: nn.Linear
    linear2: nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return SingleStreamBlock.forward(SingleCall(self, kwargs.get("transformer_options")), *args, **kwargs)


# The model


class FluxMoE(Flux):
    """comfy.ldm.flux.model.Flux whose FFNs are routed where `config` says so. `stored` are the file's tensors, of
    which only shapes and dtypes are read here; ComfyUI's loader fills them in."""

    def __init__(
        self, *args: Any, config: FluxMoEConfig, stored: Mapping[str, Tensor], device: Any = None, **kwargs: Any
    ):
        super().__init__(*args, device=device, **kwargs)
        self.config = config
        self.register_buffer(CONFIG_KEY, torch.empty_like(stored[CONFIG_KEY], device=device))
        if config.adaln_rank is not None:
            compress_modulations(self, stored["adaln_in.weight"], kwargs["operations"], kwargs.get("dtype"), device)
        gates = {mode: replace(config.gate, mode=mode) for mode in ("sum", "normalised")}
        for name, layout in config.ffns.items():
            moe = MoE(layout=layout, top_k=config.top_k, gates=gates, gate=config.gate.mode)
            kind, index, *stream = name.split(".")
            block = getattr(self, kind)[int(index)]
            # The block keeps its modules, so its keys and everything that ComfyUI built into it; only forward is new.
            if kind == "double_blocks":
                block.__class__ = DoubleExpertBlock
                mlp = ExpertFFN(*getattr(block, stream[0]))
                setattr(block, stream[0], mlp)
                mlp.add_router(moe, stored, name, device)
            else:
                block.__class__ = SingleExpertBlock
                block.add_router(moe, stored, name, device)

    def forward(self, *args: Any, d2m: Mapping[str, Any] | None = None, **kwargs: Any) -> Tensor:
        """`d2m`: see FluxMoEModel._apply_model."""
        if d2m is not None:
            kwargs["transformer_options"] = {**kwargs.get("transformer_options", {}), OPTIONS_KEY: d2m}
        return super().forward(*args, **kwargs)

    def compressed(self) -> set[str]:
        """The weights that are behind U in a file with AdaLN compression, by their names in this model."""
        return {f"{name}.lin.weight" for name, _ in modulations(self)} if self.config.adaln_rank else set()

    def neurons(self) -> dict[str, tuple[int, int, Tensor]]:
        """Of every tensor whose neurons are reordered: (axis, first, neuron_order), by its name in this model."""
        hidden_size = self.config.dims.hidden_size
        found = {}
        for ffn in self.config.ffns:
            owner = self.get_submodule(ffn)
            for parameter, _ in owner.named_parameters(prefix=ffn):
                if (place := neuron_axis(parameter, ffn, hidden_size)) is not None:
                    found[parameter] = (*place, owner.neuron_order)
        return found


class FluxMoEModel(comfy.model_base.Flux):
    def __init__(self, model_config: Any, config: FluxMoEConfig, stored: Mapping[str, Tensor], **kwargs: Any) -> None:
        unet_model = functools.partial(FluxMoE, config=config, stored=stored)
        super().__init__(model_config, unet_model=unet_model, **kwargs)

    def load_model_weights(self, sd: dict[str, Tensor], unet_prefix: str = "", assign: bool = False) -> Any:
        """Takes the file's tensors instead of copying them, so that mapped ones stay in the file until they are used.
        Those of another dtype than the model's are cast, unless the model casts at use and has the file's main dtype;
        those that products are taken with where they lie, but lie badly, are copied: their last bits would differ."""
        main, computes_in = comfy.utils.weight_dtype(sd, unet_prefix), self.get_dtype_inference()
        as_stored = self.manual_cast_dtype is not None and main == self.diffusion_model.dtype
        targets = {**dict(self.diffusion_model.named_parameters()), **dict(self.diffusion_model.named_buffers())}
        for key in list(sd) if not assign else ():
            name = key.removeprefix(unet_prefix)
            name = name.removesuffix("scale") + "weight" if name.endswith("_norm.scale") else name
            if key.startswith(unet_prefix):
                target, tensor = targets.get(name), sd[key]
                if target is not None:  # as it is for the weights of layers that may be quantised
                    tensor = tensor.to(device=target.device, dtype=None if as_stored else target.dtype)
                sd[key] = tensor.clone() if tensor.dtype == computes_in and tensor.data_ptr() % ALIGNMENT else tensor
        smoothed = [key.removeprefix(unet_prefix) for key in sd if key.endswith(".pre_quant_scale")]
        super().load_model_weights(sd, unet_prefix, assign=True)
        for layer in (key.removesuffix(".pre_quant_scale") for key in smoothed):
            if getattr(self.diffusion_model.get_submodule(layer), "pre_quant_scale", None) is None:
                raise CheckpointError(
                    f"{layer} has a pre_quant_scale, which this ComfyUI does not apply to its format. "
                    "Update ComfyUI, or quantise the FLUX-MoE without smoothing."
                )
        return self

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> Tensor:
        """Hands the settings on beside transformer_options: TorchCompileModel leaves everything within these out of
        its guards, and would run the graph of one Top-K for another."""
        settings = transformer_options.get(OPTIONS_KEY)
        if settings is not None:
            kwargs["d2m"] = settings
        return super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


# Entries of comfy.supported_models


class _Supported:
    """Makes one of ComfyUI's FLUX entries one of FLUX-MoE files, by which every loader of ComfyUI opens them."""

    model_type_of_flux = comfy.model_base.ModelType.FLUX

    @classmethod
    def matches(cls, unet_config: Any, state_dict: Any = None, *args: Any, **kwargs: Any) -> bool:
        if not super().matches(unet_config, state_dict, *args, **kwargs):  # type: ignore[misc]
            return False
        # The prefix is not always told (ComfyUI 0.18).
        return state_dict is not None and any(key == CONFIG_KEY or key.endswith(f".{CONFIG_KEY}") for key in state_dict)

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str = "", device: Any = None) -> FluxMoEModel:
        """Raises CheckpointError for a file with a missing or misshapen tensor, or one of a newer schema."""
        stored = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        config = check_state_dict(stored)
        if config.groups or config.capacity_router is not None:
            raise CheckpointError(
                f"This FLUX-MoE has {'block groups' if config.groups else 'a capacity router'}, which this version does "
                "not run yet. Update ComfyUI-Dense2MoE, or convert the teacher with --preset L."
            )
        return FluxMoEModel(self, config, stored, model_type=self.model_type_of_flux, device=device)


class FluxMoEInpaint(_Supported, comfy.supported_models.FluxInpaint):
    pass


class FluxMoEDev(_Supported, comfy.supported_models.Flux):
    pass


class FluxMoESchnell(_Supported, comfy.supported_models.FluxSchnell):
    model_type_of_flux = comfy.model_base.ModelType.FLOW


def register() -> None:
    """Put the entries ahead of ComfyUI's own, Inpaint first as there. Again is harmless."""
    models = comfy.supported_models.models
    entries = [FluxMoEInpaint, FluxMoEDev, FluxMoESchnell]
    models[:] = entries + [entry for entry in models if entry not in entries]

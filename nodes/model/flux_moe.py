"""ComfyUI's own FLUX as a FLUX-MoE: the model, and the entries of comfy.supported_models by which loaders find it.

The blocks are in blocks.py, block_groups.py and compressed_modulations.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...d2m_model.blocks import FFN, Block, blocks_of
from ...d2m_model.checkpoint import CONFIG_KEY, CheckpointError, check_state_dict
from ...d2m_model.config import FluxMoEConfig
from ...d2m_model.layout import ffn_tensors, neuron_axis
from ...d2m_model.tensor_file import ALIGNMENT, FileState
from .block_groups import BlockGroupRouter, compiled_apart
from .blocks import DoubleExpertBlock, ExpertFFN, ExpertLayer, SingleExpertBlock
from .compressed_modulations import compress_modulations, modulations
from .custom_operators import may_compile, without_graphs
from .exchanged_blocks import check_blocks, refuse_dense_use
from .settings import (
    CHOSEN_KEY,
    GRAPH_KEY,
    NEGATIVE_KEY,
    OPTIONS_KEY,
    FileSettings,
    evaluation,
    graph_settings,
    settings_of,
)

# The model


class FluxMoE(Flux):
    """comfy.ldm.flux.model.Flux with routed FFNs where `config` says so.

    `stored` are the file's tensors. Only their shapes and dtypes are read here; ComfyUI's loader copies the values.
    """

    def __init__(
        self, *args: Any, config: FluxMoEConfig, stored: Mapping[str, Tensor], device: Any = None, **kwargs: Any
    ):
        super().__init__(*args, device=device, **kwargs)
        self.config = config
        self.register_buffer(CONFIG_KEY, torch.empty_like(stored[CONFIG_KEY], device=device))
        if config.adaln_rank is not None:
            compress_modulations(self, stored["adaln_in.weight"], kwargs["operations"], kwargs.get("dtype"), device)
        file, layers = FileSettings.of(config), []
        for row, (name, layout) in enumerate(config.ffns.items()):
            ffn = FFN.parse(name)
            block: Any = self.get_submodule(ffn.block.name)
            # The block keeps its modules, and so its keys and all that ComfyUI built into it. Only forward changes.
            if ffn.block.kind == "double":
                block.__class__, block.file = DoubleExpertBlock, file
                attribute = name.removeprefix(f"{ffn.block.name}.")
                mlp = ExpertFFN(*getattr(block, attribute))
                setattr(block, attribute, mlp)
                layers.append(mlp)
            else:
                block.__class__ = SingleExpertBlock
                layers.append(block)
            layers[-1].add_router(layout, file, stored, name, row, device)
            places = ffn_tensors(name, config.dims.hidden_size)
            for linear in (places.up, places.down):
                refuse_dense_use(self.get_submodule(linear), linear)
        self.expert_layers: tuple[ExpertLayer, ...] = tuple(layers)  # not a child module, which would be saved twice

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the stock forward. Own code, because torch.compile limits graphs per code: a dense FLUX counts apart."""
        return super().forward(*args, **kwargs)

    def keep_buffers_on(self, device: torch.device) -> None:
        """Move the small tensors of the routed FFNs that are no layers to `device`, where they stay."""
        for layer in self.expert_layers:
            layer.keep_buffers_on(device)

    def compressed(self) -> set[str]:
        """Return the names of the compressed weights lin' in this model; none without AdaLN compression."""
        return {f"{name}.lin.weight" for name, _ in modulations(self)} if self.config.adaln_rank else set()

    def neurons(self) -> dict[str, tuple[int, int, Tensor]]:
        """Return (axis, first, neuron_order) of every tensor with reordered neurons, by its name in this model."""
        hidden_size = self.config.dims.hidden_size
        places = {}
        for ffn in self.config.ffns:
            owner = self.get_submodule(ffn)
            for parameter, _ in owner.named_parameters(prefix=ffn):
                if (place := neuron_axis(parameter, ffn, hidden_size)) is not None:
                    places[parameter] = (*place, owner.neuron_order)
        return places

    @functools.cached_property
    def ordered_by(self) -> dict[str, str]:
        """Names of the tensors that say what the rows or columns of a weight are: a neuron_order, or U, by the weight's."""
        orders = dict.fromkeys(self.compressed(), "adaln_in.weight")
        hidden_size = self.config.dims.hidden_size
        for ffn in self.config.ffns:
            for parameter, _ in self.get_submodule(ffn).named_parameters(prefix=ffn):
                if neuron_axis(parameter, ffn, hidden_size) is not None:
                    orders[parameter] = f"{ffn}.neuron_order"
        return orders


class FluxMoEWithGroups(FluxMoE):
    """A FLUX-MoE with block groups, which torch.compile compiles block by block: see block_groups.py."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stored, device, groups = kwargs["stored"], kwargs.get("device"), self.config.groups
        some = self.config.stand_in_rank is not None
        routers = (BlockGroupRouter(groups, index, stored, device, stand_ins=some) for index in range(len(groups)))
        self.block_groups = nn.ModuleList(routers)
        blocks: dict[Block, Any] = blocks_of(self)
        for index, group in enumerate(groups):
            for position, member in enumerate(group.members):
                blocks[member].place = (self.block_groups[index], position)
        for block in blocks.values():
            if hasattr(block, "file") or hasattr(block, "place"):
                block.__class__ = compiled_apart(block.__class__)

    @torch.compiler.disable(recursive=False)
    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> Tensor:
        """Run one evaluation, with a place in its options for the choices of its block groups."""
        options = {**transformer_options, CHOSEN_KEY: {}}
        with evaluation(self.config, options):
            return super()._forward(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)


def transformer_in(module: nn.Module) -> Any:
    """Return the transformer of a FLUX-MoE in the module of another pack that wraps it; None if it does not hold it."""
    return next((part for part in module.modules() if CONFIG_KEY in part._buffers), None)


class FluxMoEModel(comfy.model_base.Flux):
    """ComfyUI's model of a FLUX-MoE. Other packs may have wrapped its transformer, so it has the configuration too."""

    def __init__(self, model_config: Any, config: FluxMoEConfig, stored: Mapping[str, Tensor], **kwargs: Any) -> None:
        unet_model = functools.partial(FluxMoEWithGroups if config.groups else FluxMoE, config=config, stored=stored)
        super().__init__(model_config, unet_model=unet_model, **kwargs)
        self.moe_config = config
        self.source_file: tuple[str, FileState] | None = None  # which weights are mapped from, and its state

    def check_source_file(self) -> None:
        """Raise RuntimeError if the file that the weights are mapped from has changed.

        Its pages may then be gone, which ends the process without a message, or be those of another model.
        """
        patcher = self.current_patcher
        if (
            self.source_file is None and patcher is not None and not comfy.utils.DISABLE_MMAP
        ):  # ComfyUI's own loader maps too
            _, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
            if arguments and isinstance(arguments[0], str) and os.path.isfile(arguments[0]):
                self.source_file = arguments[0], FileState.of(arguments[0])
        if self.source_file is None or not os.path.exists(self.source_file[0]):  # deleted, it stays while it is mapped
            return
        path, loaded = self.source_file
        if (now := FileState.of(path)) != loaded:
            change = f"{loaded.size:,} bytes, now {now.size:,}" if now.size != loaded.size else "the same size"
            raise RuntimeError(
                f"{path} was written to or replaced after it was loaded ({change}), and the weights of this FLUX-MoE are "
                "read from it when they are used. Queue again to load the new file; if it is not loaded anew, free the model "
                "first (Edit > Unload Models and Execution Cache)."
            )

    def memory_required(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ComfyUI asks for before it reads the weights to sample, which is when the file is checked."""
        self.check_source_file()
        return super().memory_required(*args, **kwargs)

    def load_model_weights(self, sd: dict[str, Tensor], unet_prefix: str = "", assign: bool = False) -> Any:
        """Assign the file's tensors instead of copying them, so that mapped ones stay in the file until they are used.

        Tensors of another dtype than the model's are cast, unless the model casts at use and has the file's main dtype.
        Misaligned tensors that are multiplied as they are get copied: unaligned matrix products round differently.
        """
        main, computes_in = comfy.utils.weight_dtype(sd, unet_prefix), self.get_dtype_inference()
        as_stored = self.manual_cast_dtype is not None and main == self.diffusion_model.dtype
        targets = {**dict(self.diffusion_model.named_parameters()), **dict(self.diffusion_model.named_buffers())}
        for key in list(sd) if not assign else ():
            name = key.removeprefix(unet_prefix)
            name = name.removesuffix("scale") + "weight" if name.endswith("_norm.scale") else name
            if key.startswith(unet_prefix):
                target, tensor = targets.get(name), sd[key]
                if target is not None:  # None for the weights of layers that may be quantised
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
        """Call the transformer under its settings, which graphs of torch.compile get as tensors.

        Traced runs are not compiled: a graph would keep the trace that it was made with.
        """
        self.check_source_file()
        options, config = dict(transformer_options), self.moe_config
        flux = transformer_in(self.diffusion_model)
        run = kwargs.pop(NEGATIVE_KEY, None)
        if run is not None and run.config == config:
            options[OPTIONS_KEY] = run.settings(options, t, x.device)
        settings = settings_of(options)
        if flux is not None:
            check_blocks(flux, config)
            FluxMoE.keep_buffers_on(flux, x.device)  # packs may have exchanged its class, which leaves its blocks
        if flux is not self.diffusion_model or may_compile(flux):
            options[GRAPH_KEY] = graph_settings(config, settings, x.device)
        if config.groups:  # used if another pack replaces the transformer's _forward
            options[CHOSEN_KEY] = {}
        traced = settings.get("trace") is not None
        with evaluation(config, options), without_graphs(self) if traced else nullcontext():
            return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Pass on the run of a model that a guider has for negative prompts alone: see evaluation_settings.py."""
        conds: dict[str, Any] = super().extra_conds(**kwargs)
        if (run := kwargs.get(NEGATIVE_KEY)) is not None:
            conds[NEGATIVE_KEY] = comfy.conds.CONDConstant(run)
        return conds


TRANSFORMER_PREFIX = "diffusion_model."  # of the transformer's tensors in a MODEL


def require_link(value: Any, kind: type | tuple[type, ...], node: str, name: str) -> None:
    """Raise ValueError if an input that only another node can give is something else: a prompt's JSON may have anything."""
    if not isinstance(value, kind):
        raise ValueError(f"{node}: {name} is {repr(value)[:100]}. Connect the output of another node.")


def require_flux_moe(model: Any, node: str) -> FluxMoEModel:
    """Return the FLUX-MoE in the ModelPatcher `model`. Raises ValueError, naming the node, for another model."""
    require_link(model, ModelPatcher, node, "model")
    base_model = model.model
    if not isinstance(base_model, FluxMoEModel):
        raise ValueError(
            f"{node} works on a FLUX-MoE, but this MODEL is a {type(base_model).__name__} without experts. "
            "Connect a MODEL from Load FLUX-MoE, or put Convert FLUX to MoE before this node."
        )
    return base_model


# Entries of comfy.supported_models


class _Supported:
    """Mixin that makes one of ComfyUI's FLUX entries match FLUX-MoE files, so that every loader of ComfyUI opens them."""

    model_type_of_flux = comfy.model_base.ModelType.FLUX

    @classmethod
    def matches(cls, unet_config: Any, state_dict: Any = None, *args: Any, **kwargs: Any) -> bool:
        if not super().matches(unet_config, state_dict, *args, **kwargs):  # type: ignore[misc]
            return False
        # ComfyUI 0.18 does not always pass the prefix.
        return state_dict is not None and any(key == CONFIG_KEY or key.endswith(f".{CONFIG_KEY}") for key in state_dict)

    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str = "", device: Any = None) -> FluxMoEModel:
        """Build the model. Raises CheckpointError for a missing or misshapen tensor, or a newer schema."""
        stored = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        config = check_state_dict(stored)
        return FluxMoEModel(self, config, stored, model_type=self.model_type_of_flux, device=device)


class FluxMoEInpaint(_Supported, comfy.supported_models.FluxInpaint):
    pass


class FluxMoEDev(_Supported, comfy.supported_models.Flux):
    pass


class FluxMoESchnell(_Supported, comfy.supported_models.FluxSchnell):
    model_type_of_flux = comfy.model_base.ModelType.FLOW


def register() -> None:
    """Put the entries before ComfyUI's own, Inpaint first as there. A second call changes nothing."""
    models = comfy.supported_models.models
    entries = [FluxMoEInpaint, FluxMoEDev, FluxMoESchnell]
    models[:] = entries + [entry for entry in models if entry not in entries]

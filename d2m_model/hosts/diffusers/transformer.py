"""FluxMoETransformer2DModel: a FLUX-MoE in diffusers, in a FluxPipeline as in the trainer."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from diffusers import (
    FluxTransformer2DModel,
    ModelMixin,  # noqa: F401 (a pipeline that loads this class looks for its kind in this module)
)
from diffusers.loaders.single_file_utils import _extract_repo_id_and_weights_name
from diffusers.utils import _get_model_file, logging
from torch import Tensor, nn

from ...blocks import Block, blocks_of, is_modulation
from ...checkpoint import check_file, check_state_dict, optional_tensors, strip_prefix
from ...config import FluxMoEConfig
from ...keys import diffusers_sources
from ...moe import FusedFFN, MoEFFN
from ...tensor_file import TensorFile
from .blocks import ROUTINGS, RoutedSingleTransformerBlock, RoutedTransformerBlock
from .budget import ModelBudget
from .dense import transformer_options
from .lora_api import FusedLoraMixin
from .loras import FusedLoras
from .modules import AdaLNIn, CompressedModulation, GroupMember, GroupRouter, GroupRoutings, SingleExpertOut
from .quantising import Quantising
from .tensor_map import ffn_module
from .tensors import load_tensors, refuse_quantised, save_flux_moe, whole_tensor

log = logging.get_logger(__name__)

_FETCHING = ("token", "revision", "cache_dir", "proxies", "force_download", "local_files_only")


class FluxMoETransformer2DModel(FusedLoraMixin, FluxTransformer2DModel):
    """diffusers' FLUX.1 transformer with the MoE FFNs, compressed modulations and block groups of its configuration.

    flux_moe      the FluxMoEConfig
    optional      names of the file's tensors that not every FLUX-MoE has (checkpoint.optional_tensors)
    adaln_in      U of the AdaLN compression, or None
    block_groups  a GroupRouter for each of the configuration's groups; `active` and `selection` may be set

    On the meta device it has every parameter by name and shape. In train() all blocks run on all samples and are masked
    (ranks of a sharded run must do the same work); in eval() a block runs on the samples that chose it.
    """

    _keep_in_fp32_modules = ["router", "router_x", "router_y", "stand_ins", "expert_mean", "capacity", "adaln_in"]  # noqa: RUF012
    config_keys = ("flux_moe", "optional")  # the keys of config.json that construct a model; the others are diffusers'

    budget: ModelBudget | None = None  # set by set_budget
    groups_on: bool = True  # False: every block runs on every sample (the training stages before `blocks`)
    block_groups: nn.ModuleList
    adaln_in: AdaLNIn | None

    def __init__(self, flux_moe: FluxMoEConfig | Mapping[str, Any], optional: Iterable[str] = ()) -> None:
        config = flux_moe if isinstance(flux_moe, FluxMoEConfig) else FluxMoEConfig.from_json(json.dumps(flux_moe))
        super().__init__(**transformer_options(config.dims))
        self.flux_moe, self.optional = config, tuple(optional)
        self.register_to_config(flux_moe=json.loads(config.to_json()), optional=list(self.optional))
        hidden_size, device = config.dims.hidden_size, self.x_embedder.weight.device
        self.adaln_in = None
        if config.adaln_rank is not None:
            self.adaln_in = AdaLNIn(hidden_size, config.adaln_rank, bias=False)
            self._compress_modulations(self.adaln_in)
        for name in config.ffns:
            self._route_ffn(name)
        for moe in self.moe_ffns().values():
            if device.type != "meta":
                moe.to_empty(device=device)
                moe.reset_parameters()
                moe.get_buffer("neuron_order").copy_(torch.arange(moe.layout.neurons))
        self.block_groups = nn.ModuleList(
            GroupRouter(index, group, hidden_size, config.stand_in_rank) for index, group in enumerate(config.groups)
        )
        if config.groups:
            self._group_blocks()

    def _compress_modulations(self, adaln_in: AdaLNIn) -> None:
        for name, source in diffusers_sources(self.flux_moe.dims).items():
            if is_modulation(name.removesuffix(".weight")):
                owner, _, attribute = source.names[0].removesuffix(".weight").rpartition(".")
                setattr(self.get_submodule(owner), attribute, CompressedModulation(adaln_in, source.rows[0]))

    def _route_ffn(self, name: str) -> None:
        config, layout = self.flux_moe, self.flux_moe.ffns[name]
        hidden_size, prefix = config.dims.hidden_size, f"{name}."
        optional = {other.removeprefix(prefix) for other in self.optional if other.startswith(prefix)}
        fused = FusedFFN.empty(hidden_size, layout, config.router, optional)
        moe = MoEFFN(fused, layout=layout, gate=config.gate, top_k=config.top_k, router=config.router)
        moe.register_buffer("neuron_order", torch.empty(layout.neurons, dtype=torch.int32, device="meta"))
        owner, _, attribute = ffn_module(name).rpartition(".")
        if attribute != "moe":
            setattr(self.get_submodule(owner), attribute, moe)
            return
        block = self.get_submodule(owner.removesuffix(".proj_out"))
        block.proj_mlp, block.act_mlp = nn.Identity(), nn.Identity()
        block.proj_out = SingleExpertOut(nn.Linear(hidden_size, hidden_size, bias=False), moe)

    def _group_blocks(self) -> None:
        """Give every block the class that understands ROUTINGS, and the blocks of a group their membership."""
        routed = {"double": RoutedTransformerBlock, "single": RoutedSingleTransformerBlock}
        blocks: dict[Block, Any] = blocks_of(self)
        for block, module in blocks.items():
            module.__class__ = routed[block.kind]  # keeps parameters and submodules; a new block would duplicate them
        for index, group in enumerate(self.flux_moe.groups):
            for position, block in enumerate(group.members):
                blocks[block].member = GroupMember(group=index, position=position)
        self._no_split_modules = self._repeated_blocks = [kind.__name__ for kind in routed.values()]

    # Files

    @classmethod
    def from_flux_moe(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        quantization_config: Any = None,
    ) -> FluxMoETransformer2DModel:
        """Load a FLUX-MoE file as a model in eval(); `dtype` None keeps the file's (float8 becomes bfloat16).

        Routers, expert means, thresholds and U keep the file's dtypes. `quantization_config`: see quantising.py. On the
        device `meta` the model has no values. Raises CheckpointError for another file or a quantised one. No weight is in
        memory twice.
        """
        config = check_file(path)
        with TensorFile(path) as file:
            refuse_quantised(file)
            return cls._filled(config, file.shapes, file.tensor, dtype, device, quantization_config)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor], **kwargs: Any
    ) -> FluxMoETransformer2DModel:
        """Load a FLUX-MoE by its path, by its address on the Hugging Face hub, or from its tensors, as diffusers does.

        torch_dtype  `dtype` of from_flux_moe
        device       the device of the weights; the CPU by default
        quantization_config  diffusers'; see quantising.py
        For a file on the hub also: token, revision, cache_dir, proxies, force_download, local_files_only.
        """
        given = pretrained_model_link_or_path_or_dict
        dtype, device = kwargs.pop("torch_dtype", None), kwargs.pop("device", "cpu")
        quantising = kwargs.pop("quantization_config", None)
        fetching = {key: kwargs.pop(key, None) for key in _FETCHING}
        if kwargs:
            raise TypeError(f"from_single_file() of a FLUX-MoE does not take {', '.join(kwargs)}.")
        if isinstance(given, Mapping):
            tensors = strip_prefix(given)
            return cls._filled(check_state_dict(tensors), tensors, tensors.__getitem__, dtype, device, quantising)
        if not os.path.exists(given) and (address := _extract_repo_id_and_weights_name(str(given)))[1]:
            given = _get_model_file(address[0], weights_name=address[1], subfolder=None, user_agent=None, **fetching)
        return cls.from_flux_moe(given, dtype, device, quantising)

    @classmethod
    def _filled(
        cls,
        config: FluxMoEConfig,
        stored: Iterable[str],
        tensor: Callable[[str], Tensor],
        dtype: torch.dtype | None,
        device: str | torch.device,
        quantization_config: Any,
    ) -> FluxMoETransformer2DModel:
        names = set(stored)
        with torch.device("meta"):
            model = cls(config, tuple(name for name in optional_tensors(config) if name in names))
        if quantization_config is None:
            load_tensors(model, config, model.optional, tensor, dtype, device)
        else:
            quantising = Quantising(model, quantization_config, dtype, device)
            load_tensors(model, config, model.optional, tensor, quantising.dtype, device, quantising.put)
            quantising.finish()
        evaluated: FluxMoETransformer2DModel = model.eval()
        return evaluated

    def save_flux_moe(
        self,
        path: str | os.PathLike[str],
        *,
        config: FluxMoEConfig | None = None,
        dtype: torch.dtype | None = None,
        whole: Callable[[Tensor], Tensor] = whole_tensor,
        write: bool = True,
    ) -> None:
        """Write the model as a FLUX-MoE v1 file: see tensors.save_flux_moe. `config` None is the model's own.

        Fused LoRAs are in the weights; a file with them is no longer split-only.
        """
        config = config or self._current_config()
        save_flux_moe(self, config, path, dtype=dtype, whole=whole, write=write)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the fused LoRAs in the weights, which a warning says."""
        config = self._current_config()
        if (loras := getattr(self, "fused_loras", None)) is not None and loras.changes_weights:
            log.warning(
                f"The weights are saved with the LoRAs {', '.join(loras.in_weights)} in them. For the model without "
                "them, call disable_lora() before."
            )
        self.register_to_config(flux_moe=json.loads(config.to_json()))
        super().save_pretrained(*args, **kwargs)
        self.register_to_config(flux_moe=json.loads(self.flux_moe.to_json()))

    def _current_config(self) -> FluxMoEConfig:
        loras: FusedLoras | None = getattr(self, "fused_loras", None)
        if loras is not None:
            loras.refresh()
        changed = self.weights_changed or (loras is not None and loras.changes_weights)
        return replace(self.flux_moe, split_only=False) if changed else self.flux_moe

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        own = {key: config_dict[key] for key in config_dict if key in cls.config_keys or key.startswith("_")}
        return super().extract_init_dict(own, **kwargs)

    # Settings

    def moe_ffns(self) -> dict[str, MoEFFN]:
        """Return every MoE FFN by its name in the file, in the order of the configuration."""
        modules = {name: self.get_submodule(ffn_module(name)) for name in self.flux_moe.ffns}
        return {name: module for name, module in modules.items() if isinstance(module, MoEFFN)}

    def block_routers(self) -> list[GroupRouter]:
        """Return `block_groups` as a typed list."""
        return [router for router in self.block_groups if isinstance(router, GroupRouter)]

    def set_top_k(self, top_k: int) -> None:
        """Set the number of experts per token in every FFN. Raises ValueError unless it is a whole number, 0 to all experts.

        Has no effect where another setting steers the routers. Ends a budget.
        """
        if isinstance(top_k, bool) or not isinstance(top_k, SupportsIndex):
            raise ValueError(f"top_k is {top_k!r}; expected a whole number of experts.")
        top_k = operator.index(top_k)
        for name, moe in self.moe_ffns().items():
            if not 0 <= top_k <= moe.layout.experts:
                raise ValueError(f"top_k is {top_k}; expected 0 to {moe.layout.experts}, the experts of {name}.")
        self._steer("top_k", top_k)

    def set_capacity_factor(self, factor: Any) -> None:
        """Set the compute slider of capacity routers; 1 is the file's own (capacity_routing.route_by_threshold).

        Raises ValueError unless it is a number of 0 or more. Ends a budget.
        """
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ValueError(f"The capacity factor is {factor!r}; expected a number of 0 or more.")
        self._steer("capacity", factor)

    def _steer(self, setting: str, value: float) -> None:
        self.set_budget(None)
        if self.flux_moe.router.setting == setting:
            self.set_router_value(value)

    def set_router_value(self, value: float) -> None:
        """Set the value of the setting that steers the file's routers, in every FFN."""
        for moe in self.moe_ffns().values():
            moe.router_value = value

    def set_budget(self, budget: float | None, sigmas: Iterable[float] = ()) -> None:
        """Set a share of the dense model's FLOPs, above 0 and up to 1, to spend where it counts; None ends the budget.

        Experts per token of each FFN and active blocks of each group follow the noise level, by the file's sensitivity
        table (see d2m_model/budget.py). A file without one gets one k for all FFNs, and a warning. `sigmas` are the noise
        levels of the run, such as `scheduler.sigmas`; without them every bin of the table counts for as many steps.
        The end of a budget brings back the file's own values. A budget acts in eval() alone.
        """
        if budget is not None:
            self.budget = ModelBudget(budget, sigmas)
        elif self.budget is not None:
            self.budget = None
            self.set_router_value(self.flux_moe.router_value)
            for router, group in zip(self.block_routers(), self.flux_moe.groups, strict=True):
                router.active = group.active

    def clear_routings(self) -> None:
        """Forget the choices of the last forward pass in training."""
        for moe in self.moe_ffns().values():
            moe.routing = None
        for router in self.block_routers():
            router.routing = router.compared = None

    def train(self, mode: bool = True) -> FluxMoETransformer2DModel:
        """Switch between train() and eval(). eval() drops the last choices: a skipped block would keep an old one."""
        if not mode:
            self.clear_routings()
        switched: FluxMoETransformer2DModel = super().train(mode)
        return switched

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Any:
        """Run the model like FluxTransformer2DModel.forward."""
        if (loras := getattr(self, "fused_loras", None)) is not None:
            loras.refresh()
        if self.budget is not None and not self.training:
            assert encoder_hidden_states is not None
            assert timestep is not None
            self.budget.apply(self, hidden_states, encoder_hidden_states, timestep)
        if self.block_groups and self.groups_on:
            joint_attention_kwargs = {
                **(joint_attention_kwargs or {}),
                ROUTINGS: GroupRoutings(routers=self.block_groups),
            }
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            joint_attention_kwargs=joint_attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            return_dict=return_dict,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
        )

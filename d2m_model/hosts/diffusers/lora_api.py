"""diffusers' methods for LoRAs on a FLUX-MoE: the pipeline's load_lora_weights, set_adapters, fuse_lora, ... call them.

They do not use PEFT, but the pipeline's own methods refuse to run where PEFT is not installed.
"""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from torch import Tensor

from ...config import FluxMoEConfig
from ...lora_file import read_lora
from .loras import FusedLoras, changes_of_model
from .tensor_map import ffn_module

log = logging.get_logger(__name__)

_FETCHING = (
    *("weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token"),
    *("revision", "subfolder"),
)


class FusedLoraMixin(PeftAdapterMixin):
    """The methods of diffusers' PeftAdapterMixin, for LoRAs that are fused into the weights."""

    flux_moe: FluxMoEConfig
    fused_loras: FusedLoras
    weights_changed = False  # True after LoRAs were unloaded while they were fused

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Fuse a LoRA of FLUX.1 in diffusers' names (as FluxPipeline.lora_state_dict returns) and make it active.

        Keywords are diffusers': adapter_name, network_alphas, metadata, and those of files. Raises ValueError for a name
        in use, and LoraError (a ValueError) for other adapters than a LoRA of FLUX.1.
        """
        fetching: dict[str, Any] = {key: kwargs.pop(key, None) for key in _FETCHING}
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            metadata=kwargs.pop("metadata", None),
            **fetching,
        )
        name, alphas = kwargs.pop("adapter_name", None), kwargs.pop("network_alphas", None)
        start = "" if prefix is None else f"{prefix}."
        tensors, alphas, config = (_under_prefix(named, start) for named in (state_dict, alphas, metadata))
        lora = read_lora(_with_alphas(tensors, alphas), self.flux_moe.dims, config)
        unknown = [*lora.unknown, *lora.norms]
        if not lora.changes and not unknown:
            log.warning(f"The loaded file has no LoRA for {prefix!r}.")
            return
        loras = getattr(self, "fused_loras", None) or FusedLoras(self)
        name = f"default_{len(loras.adapters)}" if name is None else name
        if (name in loras.adapters) != hotswap:
            raise ValueError(
                f"There is no LoRA {name!r} to exchange (hotswap)."
                if hotswap
                else f"There is a LoRA {name!r} already. Give another adapter_name, or delete that one."
            )
        if own := [name for name in unknown if self._is_of_experts(name)]:
            raise ValueError(
                f"This LoRA was trained on layers that only a FLUX-MoE has ({own[0]}), in its own neuron order. Train it on "
                "the dense FLUX.1, or on attention alone (to_q, to_k, to_v, to_out.0), and load it here."
            )
        if not lora.changes:
            raise ValueError(f"This is not a LoRA of FLUX.1: it has {unknown[0]}, which FLUX.1 does not have.")
        if unknown:
            log.warning(f"Left out of the LoRA, since FLUX.1 does not have them: {', '.join(unknown)}.")
        changes = changes_of_model(lora.changes, self.flux_moe, self.state_dict())
        pipeline = kwargs.pop("_pipeline", None)
        model_offload, sequential_offload, *_ = self._optionally_disable_offloading(pipeline)
        loras.add(name, changes)
        self.fused_loras = loras
        self._name_adapters()
        if model_offload:
            pipeline.enable_model_cpu_offload()
        elif sequential_offload:
            pipeline.enable_sequential_cpu_offload()

    def _is_of_experts(self, name: str) -> bool:
        """Return whether a LoRA's tensor belongs to the experts, routers or means of this model."""
        prefixes = [f"{ffn_module(ffn)}." for ffn in self.flux_moe.ffns]
        prefixes += [f"{ffn_module(ffn).rpartition('.')[0]}.attention" for ffn in self.flux_moe.ffns if "single" in ffn]
        return any(prefix in f"{name}." for prefix in prefixes)

    def _name_adapters(self) -> None:
        """Set `peft_config`, in which pipelines look up the adapters' names."""
        self.peft_config = dict.fromkeys(self._loras().adapters)
        self._hf_peft_config_loaded = True

    def _loras(self) -> FusedLoras:
        loras: FusedLoras | None = getattr(self, "fused_loras", None)
        if loras is None:
            raise ValueError("No LoRA is loaded.")
        return loras

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        weights: float | list[float] | list[None] | list[float | None] | None = None,
    ) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        scales = weights if isinstance(weights, list) else [weights] * len(names)
        if len(names) != len(scales):
            raise ValueError(
                f"There are {len(names)} adapter names and {len(scales)} weights; expected one weight per name."
            )
        loras = self._loras()
        for scale in scales:
            if isinstance(scale, Mapping):
                raise ValueError(f"{dict(scale)}: scales per block; a FLUX-MoE takes one number per adapter.")
        loras.scaling |= {
            name: 1.0 if scale is None else float(scale) for name, scale in zip(names, scales, strict=True)
        }
        loras.set_adapter(names)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        self._loras().set_adapter(adapter_name)

    def active_adapters(self) -> list[str]:
        return self._loras().active_adapters

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Keep the active LoRAs in the weights until unfuse_lora, even when they are unloaded."""
        loras = self._loras()
        if lora_scale != 1:
            loras.scale_layer(lora_scale)
        loras.merge(safe_fusing, adapter_names)

    def unfuse_lora(self) -> None:
        self._loras().unmerge()

    def disable_lora(self) -> None:
        self._loras().enable_adapters(False)

    def enable_lora(self) -> None:
        self._loras().enable_adapters(True)

    disable_adapters, enable_adapters = disable_lora, enable_lora

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._loras().delete_adapter(name)
        self._name_adapters()

    def unload_lora(self) -> None:
        """Drop all LoRAs. Fused ones stay in the weights, as in diffusers."""
        if getattr(self, "fused_loras", None) is None:
            return
        if self.fused_loras.leave():
            self.weights_changed = True
        del self.fused_loras
        del self.peft_config
        self._hf_peft_config_loaded = False

    def add_adapter(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "A new adapter is not trained on a FLUX-MoE, whose experts have another neuron order: train it on the dense "
            "FLUX.1, and load it here. For attention alone, peft.get_peft_model takes this model."
        )

    def save_lora_adapter(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "The LoRAs of a FLUX-MoE are permuted to its neuron order; keep the file that they were loaded from."
        )


def _under_prefix(named: Mapping[str, Any] | None, start: str) -> dict[str, Any]:
    return {key.removeprefix(start): value for key, value in (named or {}).items() if key.startswith(start)}


def _with_alphas(tensors: dict[str, Tensor], alphas: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors in PEFT's names, with an alpha for every module if `alphas` has any: else the most common one."""
    if not any("lora_A" in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    if not alphas:
        return tensors
    by_module = {re.split(r"\.alpha$|\.lora_", key)[0]: float(value) for key, value in alphas.items()}
    usual = Counter(by_module.values()).most_common(1)[0][0]
    modules = {key.partition(".lora_B.")[0] for key in tensors if ".lora_B." in key}
    return tensors | {
        f"{module}.alpha": torch.tensor(by_module.get(module, usual), dtype=torch.float64) for module in modules
    }


# Pipelines


def _switch_over() -> None:
    """Make `from_pipe` take over a FLUX-MoE, which it leaves behind for being of another class than FLUX's."""
    original = DiffusionPipeline.from_pipe.__func__

    def from_pipe(cls: type, pipeline: Any, **kwargs: Any) -> Any:
        transformer = getattr(pipeline, "transformer", None)
        if isinstance(transformer, FusedLoraMixin) and "transformer" in inspect.signature(cls).parameters:
            kwargs.setdefault("transformer", transformer)
        return original(cls, pipeline, **kwargs)

    DiffusionPipeline.from_pipe = classmethod(from_pipe)


_switch_over()


def _leave_to_transformer(mixin: type, method: str, answer: Callable[[Any], Any]) -> None:
    """Make the pipeline's `method` return `answer(lora_state_dict)` if its transformer is a FLUX-MoE.

    Before a pipeline passes a LoRA to its transformer, these methods compare it with the shapes of dense layers, which a
    FLUX-MoE does not have, and the transformer has no way to override them. Other transformers are treated as before.
    """
    original = getattr(mixin, method).__func__

    def method_of_pipelines(cls: type, transformer: Any, lora_state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(transformer, FusedLoraMixin):
            return answer(lora_state_dict)
        return original(cls, transformer, lora_state_dict, *args, **kwargs)

    setattr(mixin, method, classmethod(method_of_pipelines))


with suppress(ImportError):  # without transformers there is no FluxPipeline
    from diffusers.loaders import FluxLoraLoaderMixin

    _leave_to_transformer(FluxLoraLoaderMixin, "_maybe_expand_transformer_param_shape_or_error_", lambda _: False)
    _leave_to_transformer(FluxLoraLoaderMixin, "_maybe_expand_lora_state_dict", lambda state_dict: state_dict)

with suppress(ImportError):
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.register(FusedLoras)  # the class that pipelines look for among the model's modules

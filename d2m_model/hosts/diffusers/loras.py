"""LoRAs in a FLUX-MoE: permuted and fused into the weights, reversibly.

A LoRA is trained on dense FLUX. Its neurons are in the teacher's order, and its shapes do not fit the layers of a MoE FFN.
So its factors are brought into the model's order and their product is added to the weights. The original weights stay on
the CPU: removing a LoRA restores every bit.

Shapes: O outputs, I inputs, R rank of a LoRA, A rank of the AdaLN compression, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...adaln import lost_low_rank_change, map_change, pseudo_inverse
from ...blocks import is_modulation
from ...config import FluxMoEConfig
from ...layout import neuron_axis
from ...lora_file import LoraChange
from .tensor_map import TensorSlice, ffn_module, tensor_map

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, frozen=True)
class LowRank:
    """A scaled change of one dense tensor: up [O, R] times down [R, I], or `up` alone, as large as the tensor."""

    up: Tensor
    down: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.up.shape) if self.down is None else (self.up.shape[0], self.down.shape[1])

    def permuted(self, axis: int, first: int, order: Tensor) -> LowRank:
        """Return the change of a tensor whose neurons, from index `first` of the axis on, are in `order`."""
        index = torch.arange(self.shape[axis])
        index[first : first + len(order)] = first + order.cpu().long()
        if axis == 0:
            return LowRank(up=self.up[index], down=self.down)
        if self.down is None:
            return LowRank(up=self.up[:, index], down=None)
        return LowRank(up=self.up, down=self.down[:, index])

    def part(self, axis: int, start: int, size: int) -> LowRank:
        if axis == 0:
            return LowRank(up=self.up.narrow(0, start, size), down=self.down)
        if self.down is None:
            return LowRank(up=self.up.narrow(1, start, size), down=None)
        return LowRank(up=self.up, down=self.down.narrow(1, start, size))

    def dense(self, device: torch.device) -> Tensor:
        up = self.up.to(device, torch.float32)
        return up if self.down is None else up @ self.down.to(device, torch.float32)


@dataclass(kw_only=True, slots=True, frozen=True)
class Change:
    """A LoRA's change of one tensor of the model: `change` is laid out as the slice `part` of the file's tensor."""

    change: LowRank
    part: TensorSlice

    def dense(self, device: torch.device) -> Tensor:
        return self.part.to_model(self.change.dense(device), first=self.part.start)


def changes_of_model(
    lora: Iterable[LoraChange], config: FluxMoEConfig, tensors: Mapping[str, Tensor]
) -> dict[str, list[Change]]:
    """Turn a LoRA's changes of a dense FLUX.1 into changes of the model's `tensors`, by their names.

    Logs how much of the changes a compressed modulation loses.
    """
    slices = tensor_map(config)
    owner = {parts[-1].name: ffn for ffn in config.ffns for parts in _ffn_slices(ffn, slices)}
    changes: dict[str, list[Change]] = {}
    lost, whole = 0.0, 0.0
    inverse_HA = pseudo_inverse(tensors["adaln_in.weight"].cpu()) if config.adaln_rank is not None else None
    for dense in lora:
        up = dense.up.detach().to("cpu", torch.float32) * dense.scale
        down = None if dense.down is None else dense.down.detach().to("cpu", torch.float32)
        if (
            down is None
            and up.ndim == 2
            and inverse_HA is not None
            and is_modulation(dense.name.removesuffix(".weight"))
        ):
            down = torch.eye(up.shape[1])  # a product, as compressed modulations take it
        change, parts = LowRank(up=up, down=down), slices[dense.name]
        if (ffn := owner.get(parts[-1].name)) is not None:
            order = tensors[f"{ffn_module(ffn)}.neuron_order"]
            axis_and_first = neuron_axis(dense.name, ffn, config.dims.hidden_size)
            if axis_and_first is not None:
                axis, first = axis_and_first
                first -= dense.first if axis == 0 else 0
                if 0 <= first < change.shape[axis]:  # of a single block's linear1 a LoRA may change q alone
                    change = change.permuted(axis, first, order)
        elif inverse_HA is not None and down is not None and tensors[parts[0].name].shape[1] != down.shape[1]:
            squares = lost_low_rank_change(up, down, tensors["adaln_in.weight"].cpu(), inverse_HA)
            lost, whole = lost + squares[0], whole + squares[1]
            change = LowRank(up=up, down=map_change(down, inverse_HA))
        for part in parts:
            start = part.start - dense.first if part.axis == 0 else part.start
            if start >= 0 and start + part.size <= change.shape[part.axis]:
                own = change.part(part.axis, start, part.size)
                changes.setdefault(part.name, []).append(Change(change=own, part=part))
    if whole:
        share = (lost / whole) ** 0.5
        log.log(
            logging.WARNING if share > 0.01 else logging.INFO,
            "%.1f %% of what this LoRA changes in the modulations is lost: they are compressed in this FLUX-MoE.",
            100 * share,
        )
    return changes


def _ffn_slices(ffn: str, slices: Mapping[str, tuple[TensorSlice, ...]]) -> Iterable[tuple[TensorSlice, ...]]:
    """Return the slices of every tensor that holds a part of the FFN."""
    module = f"{ffn_module(ffn)}."
    return (parts for parts in slices.values() if parts[-1].name.startswith(module))


class FusedLoras(nn.Module):
    """The LoRAs of one model. diffusers' pipelines take it for one of PEFT's tuner layers, whose names its methods have.

    If any LoRAs are merged, those run, with the scales they had when they were merged; otherwise the active ones run.
    """

    lora_A: Mapping[str, Tensor] = {}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # not a child
        self.adapters: dict[str, dict[str, list[Change]]] = {}
        self.scaling: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self._merged: dict[str, float] = {}
        self._applied: dict[str, float] = {}
        self._originals: dict[str, Tensor] = {}

    @property
    def r(self) -> dict[str, dict[str, list[Change]]]:
        """Adapters by name. PEFT has their ranks here; diffusers only counts them."""
        return self.adapters

    @property
    def in_weights(self) -> list[str]:
        """Names of the adapters that the weights have now."""
        return list(self._applied)

    @property
    def changes_weights(self) -> bool:
        return bool(self._applied)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def add(self, name: str, changes: dict[str, list[Change]]) -> None:
        """Load a LoRA, or replace the one of that name, and make it the only active one, as PEFT does."""
        self.undo()
        self.adapters[name], self.scaling[name] = changes, 1.0
        self.set_adapter([name])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if missing := [name for name in names if name not in self.adapters]:
            raise ValueError(f"There is no LoRA {missing[0]!r}; expected some of {list(self.adapters)}.")
        self.active_adapters = names
        self.refresh()

    def set_scale(self, adapter: str, scale: float) -> None:
        self.scaling[adapter] = float(scale)
        self.refresh()

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            self.scaling[name] *= scale
        self.refresh()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Restore the scales. The weights follow at the next forward pass, so one with the same scale changes nothing."""
        for name in self.active_adapters:
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def enable_adapters(self, enabled: bool) -> None:
        self.disable_adapters = not enabled
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.adapters and name not in self.merged_adapters:
                self.merged_adapters.append(name)
                self._merged[name] = self.scaling[name]
        self.refresh()

    def unmerge(self) -> None:
        self.merged_adapters, self._merged = [], {}
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.adapters:
            return
        self.undo()
        del self.adapters[adapter_name], self.scaling[adapter_name]
        self._merged.pop(adapter_name, None)
        self.merged_adapters = [name for name in self.merged_adapters if name != adapter_name]
        rest = [name for name in self.active_adapters if name != adapter_name]
        self.set_adapter(rest or list(self.adapters)[:1])

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the weights up to date with the settings, starting from the weights without any LoRA."""
        wanted = self._merged or {name: self.scaling[name] for name in self.active_adapters}
        if self.disable_adapters:
            wanted = {}
        wanted = {name: scale for name, scale in wanted.items() if scale}
        if wanted == self._applied:
            return
        tensors = dict(self._model[0].named_parameters())
        touched = {name for adapter in wanted for name in self.adapters[adapter]}
        if any(tensors[name].is_meta for name in touched | self._originals.keys()):
            raise ValueError("The model is offloaded module by module; set its LoRAs before that.")
        for name in sorted(self._originals.keys() - touched):
            tensors[name].copy_(self._originals.pop(name))
        for name in sorted(touched):
            tensor = tensors[name]
            original = self._originals.setdefault(name, tensor.detach().to("cpu", copy=True))
            changed = original.to(tensor.device, torch.float32)
            for adapter, scale in wanted.items():
                for change in self.adapters[adapter].get(name, ()):
                    changed = changed + scale * change.dense(tensor.device)
            tensor.copy_(changed)
        self._applied = wanted

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the weights bit for bit. The settings stay, for the next `refresh`."""
        tensors = dict(self._model[0].named_parameters())
        for name, original in self._originals.items():
            tensors[name].copy_(original)
        self._originals, self._applied = {}, {}

    def leave(self) -> bool:
        """Remove the LoRAs that are not merged before this object is dropped. Return True if merged ones stay."""
        self.disable_adapters = False
        if not self._merged:
            self.undo()
        else:
            self.refresh()
        return bool(self._merged)

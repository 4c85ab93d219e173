"""The map between the tensors of a FLUX-MoE file and those of diffusers' model. Loading, saving and LoRAs share it.

Shapes: H hidden size, S neurons of the shared expert, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...blocks import FFN
from ...checkpoint import expected_tensors, optional_tensors
from ...config import FluxMoEConfig
from ...keys import diffusers_sources, swap_halves
from ...layout import ffn_tensors


@dataclass(kw_only=True, slots=True, frozen=True)
class TensorSlice:
    """A slice of a file's tensor, `size` indices of `axis` from `start` on, and `name`, the model's tensor that holds it.

    experts  E for the neurons of all routed experts, whose tensors in the model are [E, F, H], [E, F] and [E, H, F]
    swap     True if the model holds the two halves in the other order
    """

    name: str
    axis: int
    start: int
    size: int
    experts: int | None = None
    swap: bool = False

    def to_model(self, stored: Tensor, first: int = 0) -> Tensor:
        """Return the model's tensor, a view of the file's tensor unless halves are swapped.

        `stored` may be a part of the file's tensor that begins at index `first` of the axis and covers this slice.
        """
        part = stored.narrow(self.axis, self.start - first, self.size)
        if self.swap:
            return swap_halves(part)
        if self.experts is None:
            return part
        split = part.unflatten(self.axis, (self.experts, -1))
        return split.transpose(0, 1) if self.axis == 1 else split

    def to_file(self, tensor: Tensor) -> Tensor:
        """Return this slice of the file's tensor from the model's tensor: the inverse of `to_model`."""
        if self.swap:
            return swap_halves(tensor)
        if self.experts is None:
            return tensor
        return tensor.transpose(0, 1).flatten(1) if self.axis == 1 else tensor.flatten(0, 1)


def ffn_module(ffn: str) -> str:
    """Return the name of a MoEFFN in the model by the FFN's name in the file."""
    module, stream = FFN.parse(ffn).diffusers_name, FFN.parse(ffn).stream
    return f"{module}.proj_out.moe" if stream == "joint" else module


def tensor_map(config: FluxMoEConfig, optional: Iterable[str] = ()) -> dict[str, tuple[TensorSlice, ...]]:
    """Return the slices, in order, of every tensor of a FLUX-MoE file except `d2m_config`.

    `optional` are those of checkpoint.optional_tensors that the file has.
    """
    slices = {
        name: _stacked(source.names, source.rows, source.swap)
        for name, source in diffusers_sources(config.dims).items()
    }
    for ffn in config.ffns:
        slices |= _ffn_slices(ffn, config, slices)
    shapes, known = expected_tensors(config), optional_tensors(config)
    for name, shape in (shapes | {name: known[name] for name in optional}).items():
        if name not in slices:
            slices[name] = _stacked((_added_tensor(name, config),), shape[:1])
    return slices


def _ffn_slices(
    ffn: str, config: FluxMoEConfig, dense: Mapping[str, tuple[TensorSlice, ...]]
) -> dict[str, tuple[TensorSlice, ...]]:
    """Map the tensors of one FFN. In a single block, q, k and v (or the attention's output) come before its neurons."""
    stored, moe, layout = ffn_tensors(ffn, config.dims.hidden_size), ffn_module(ffn), config.ffns[ffn]

    def neurons(axis: int, first: int, shared: str, routed: str) -> tuple[TensorSlice, ...]:
        first_routed, count = first + layout.shared, layout.experts * layout.width
        return (
            TensorSlice(name=f"{moe}.{shared}", axis=axis, start=first, size=layout.shared),
            TensorSlice(name=f"{moe}.{routed}", axis=axis, start=first_routed, size=count, experts=layout.experts),
        )

    slices = {}
    for kind, routed in (("weight", "routed_up"), ("bias", "routed_up_bias")):
        up = f"{stored.up}.{kind}"
        qkv = tuple(part for part in dense[up] if part.start < stored.first_row)
        slices[up] = qkv + neurons(0, stored.first_row, f"shared_up.{kind}", routed)
    columns, attention = stored.first_column, f"{moe.removesuffix('moe')}attention.weight"
    before = (TensorSlice(name=attention, axis=1, start=0, size=columns),) if columns else ()
    slices[f"{stored.down}.weight"] = before + neurons(1, columns, "shared_down.weight", "routed_down")
    slices[f"{stored.down}.bias"] = _stacked((f"{moe}.shared_down.bias",), (config.dims.hidden_size,))
    return slices


def _stacked(names: tuple[str, ...], sizes: tuple[int, ...], swap: bool = False) -> tuple[TensorSlice, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        TensorSlice(name=name, axis=0, start=start, size=size, swap=swap)
        for name, start, size in zip(names, starts, sizes, strict=True)
    )


def _added_tensor(name: str, config: FluxMoEConfig) -> str:
    """Return the model's name of a tensor that dense FLUX.1 does not have."""
    for ffn in (".".join(name.split(".")[:parts]) for parts in (2, 3)):
        if ffn in config.ffns:
            own = name.removeprefix(f"{ffn}.")
            return f"{ffn_module(ffn)}.{config.router.names_in_model.get(own, own)}"
    return name

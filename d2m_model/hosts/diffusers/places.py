"""Where every tensor of a FLUX-MoE file lies in diffusers' model, and the way between the two.

One table serves loading, saving and LoRAs. Shapes: H hidden size, S neurons of the shared expert, E experts, F expert
width.
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
class Place:
    """A part of a file's tensor, `size` indices of `axis` from `start` on, and the model's tensor `name` that holds it.

    `experts` is E where these are the neurons of all routed experts, whose tensors in the model are [E, F, H], [E, F]
    and [E, H, F]. `swap`: the two halves stand the other way round.
    """

    name: str
    axis: int
    start: int
    size: int
    experts: int | None = None
    swap: bool = False

    def take(self, stored: Tensor, first: int = 0) -> Tensor:
        """The model's tensor out of the file's, a view wherever nothing has to move.

        `stored` may be a part of the file's tensor, from index `first` of the axis on, that has all of this place.
        """
        part = stored.narrow(self.axis, self.start - first, self.size)
        if self.swap:
            return swap_halves(part)
        if self.experts is None:
            return part
        split = part.unflatten(self.axis, (self.experts, -1))
        return split.transpose(0, 1) if self.axis == 1 else split

    def give(self, held: Tensor) -> Tensor:
        """The part of the file's tensor out of the model's: `take` backwards."""
        if self.swap:
            return swap_halves(held)
        if self.experts is None:
            return held
        return held.transpose(0, 1).flatten(1) if self.axis == 1 else held.flatten(0, 1)


def ffn_module(ffn: str) -> str:
    """The name of a MoEFFN in the model, by the FFN's name in the file."""
    module, stream = FFN.parse(ffn).diffusers_name, FFN.parse(ffn).stream
    return f"{module}.proj_out.moe" if stream == "joint" else module


def places(config: FluxMoEConfig, optional: Iterable[str] = ()) -> dict[str, tuple[Place, ...]]:
    """For every tensor of a FLUX-MoE file but `d2m_config`, its parts in order. `optional`: those it has besides."""
    table = {
        name: _stacked(source.names, source.rows, source.swap)
        for name, source in diffusers_sources(config.dims).items()
    }
    for ffn in config.ffns:
        table |= _ffn_places(ffn, config, table)
    shapes, there = expected_tensors(config), optional_tensors(config)
    for name, shape in (shapes | {name: there[name] for name in optional}).items():
        if name not in table:
            table[name] = _stacked((_beside_dense(name, config),), shape[:1])
    return table


def _ffn_places(
    ffn: str, config: FluxMoEConfig, dense: Mapping[str, tuple[Place, ...]]
) -> dict[str, tuple[Place, ...]]:
    """Of the tensors that hold one FFN. A single block's have q, k and v, or the attention's output, ahead of it."""
    at, moe, layout = ffn_tensors(ffn, config.dims.hidden_size), ffn_module(ffn), config.ffns[ffn]

    def neurons(axis: int, first: int, shared: str, routed: str) -> tuple[Place, ...]:
        after, count = first + layout.shared, layout.experts * layout.width
        return (
            Place(name=f"{moe}.{shared}", axis=axis, start=first, size=layout.shared),
            Place(name=f"{moe}.{routed}", axis=axis, start=after, size=count, experts=layout.experts),
        )

    found = {}
    for kind, routed in (("weight", "routed_up"), ("bias", "routed_up_bias")):
        qkv = tuple(place for place in dense[f"{at.up}.{kind}"] if place.start < at.first_row)
        found[f"{at.up}.{kind}"] = qkv + neurons(0, at.first_row, f"shared_up.{kind}", routed)
    attention = (Place(name=f"{moe.removesuffix('moe')}attention.weight", axis=1, start=0, size=at.first_column),)
    down = neurons(1, at.first_column, "shared_down.weight", "routed_down")
    found[f"{at.down}.weight"] = attention + down if at.first_column else down
    found[f"{at.down}.bias"] = _stacked((f"{moe}.shared_down.bias",), (config.dims.hidden_size,))
    return found


def _stacked(names: tuple[str, ...], sizes: tuple[int, ...], swap: bool = False) -> tuple[Place, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        Place(name=name, axis=0, start=start, size=size, swap=swap)
        for name, start, size in zip(names, starts, sizes, strict=True)
    )


def _beside_dense(name: str, config: FluxMoEConfig) -> str:
    """The model's name of a tensor that dense FLUX.1 does not have."""
    for ffn in (".".join(name.split(".")[:parts]) for parts in (2, 3)):
        if ffn in config.ffns:
            own = name.removeprefix(f"{ffn}.")
            return f"{ffn_module(ffn)}.{'capacity.threshold' if own == 'threshold' else own}"
    return name

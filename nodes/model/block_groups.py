"""Block groups (Mixture of Blocks, see d2m_model/mob.py) in ComfyUI's own FLUX.

A block of a group stays ComfyUI's block, at its index and with its arguments; it runs on the samples that chose it and
returns the others' streams as they came. The choice is made at the group's first block, from the streams ahead of it,
and lies in the transformer_options of the one evaluation that it belongs to, where the group's other blocks find it.

torch.compile. Which samples run a block the host must know before it can leave the others out, so a graph breaks at
every group, and ComfyUI's loop over the blocks then runs as it is and blocks are graphs of their own. TorchCompileModel
leaves everything within transformer_options out of its guards, so that such a graph would go on with the settings and
choices that it was traced with. So these blocks have a door outside of all graphs (`ApartBlock`): there settings and
choices are read, and what a graph has to know comes to it as an argument, which is guarded.

Shapes: B batch, T tokens, H hidden size, M blocks of a group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor, nn

from ...d2m_model.config import BlockGroup
from ...d2m_model.mob import (
    BlockRouting,
    SampleSubset,
    mean_tokens,
    route_blocks,
    samples_per_block,
    scatter_rows,
    select_rows,
)
from .blocks import cast_router, router_linear
from .settings import Choice, FileChoice, active_blocks, settings_of

CHOSEN_KEY = "d2m_chosen"  # of transformer_options: what groups chose in this evaluation

Chosen = dict[
    int, list[SampleSubset] | None
]  # by group, of each of its blocks; None where there is more than one choice


class BlockGroupRouter(nn.Module):
    """The router of `groups[index]`: `router_x` and `router_y`, by the file's names."""

    def __init__(
        self, groups: Sequence[BlockGroup], index: int, stored: Mapping[str, Tensor], device: torch.device | None
    ) -> None:
        super().__init__()
        self.groups, self.index = tuple(groups), index
        self.router_x = router_linear(stored[f"block_groups.{index}.router_x.weight"], False, device)
        self.router_y = router_linear(stored[f"block_groups.{index}.router_y.weight"], False, device)

    def samples(
        self, position: int, streams: Sequence[Tensor], vec_BH: Tensor, options: Mapping[str, Any] | None
    ) -> SampleSubset:
        """Those that run the group's block at `position`.

        The first of the group's blocks that is asked chooses for all of them: its first, unless another pack has put
        something of its own in place of that. A block that finds no choice of its batch (packs may call blocks without
        transformer_options, or with a part of the batch) makes its own.
        """
        batch = streams[0].shape[0]
        chosen: Chosen | None = (options or {}).get(CHOSEN_KEY)
        known = None if chosen is None or position == 0 else chosen.get(self.index)
        if known is not None and known[position].batch == batch:
            return known[position]
        found = samples_per_block(self.route(streams, vec_BH, options))
        if chosen is not None and (position == 0 or self.index not in chosen):
            # Asked twice in one evaluation, the first block sees the batch in parts: no choice is everyone's.
            chosen[self.index] = None if self.index in chosen else found
        return found[position]

    def route(self, streams: Sequence[Tensor], vec_BH: Tensor, options: Mapping[str, Any] | None) -> BlockRouting:
        x_MH, _, x_token = cast_router(self.router_x, vec_BH.device)
        y_MH, _, y_token = cast_router(self.router_y, vec_BH.device)
        active = active_blocks(settings_of(options).get("active_blocks"), self.groups)[self.index]
        selection = self.groups[self.index].selection
        routing = route_blocks(mean_tokens(*streams), vec_BH, x_MH, y_MH, active, selection)
        if (trace := settings_of(options).get("trace")) is not None:
            trace.blocks(self.index, routing)
        comfy.ops.uncast_bias_weight(self.router_x, x_MH, None, x_token)
        comfy.ops.uncast_bias_weight(self.router_y, y_MH, None, y_token)
        return routing


# Blocks


@dataclass(slots=True)
class Call:
    """One call of a block: the streams as they came, the samples that it runs on, and what it is then called with."""

    streams: tuple[Tensor, ...]
    samples: SampleSubset
    choice: Choice | None  # None: of a dense block
    arguments: dict[str, Any]
    whole: bool  # it sees the others' samples too


class ApartBlock:
    """Mixed into a block of a FLUX-MoE that is compiled block by block."""

    names: tuple[str, ...]  # of the arguments, by position
    streams: tuple[str, ...]  # those that it returns
    file: FileChoice | None = None
    place: tuple[BlockGroupRouter, int] | None = None  # in a group; in a tuple, or its router would be a child of it

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.enter(args, kwargs)
        if call.samples.count == 0:
            found = call.streams
        elif call.choice is None:
            found = self.leave(call, super().forward(**call.arguments))  # type: ignore[misc]
        else:
            found = self.leave(call, self.run(call.choice, **call.arguments))  # type: ignore[attr-defined]
        return found if len(found) > 1 else found[0]

    @torch.compiler.disable
    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        options = arguments.pop("transformer_options", None)
        streams = tuple(arguments[name] for name in self.streams)
        batch = streams[0].shape[0]
        samples, whole = SampleSubset(batch=batch, count=batch, index_S=None), False
        if self.place is not None:
            group, position = self.place
            samples = group.samples(position, streams, arguments["vec"], options)
            whole = samples.index_S is not None and patched(options)
        if whole:  # blocks write in place
            arguments |= {name: stream.clone() for name, stream in zip(self.streams, streams, strict=True)}
        else:
            arguments = select_rows(arguments, samples)
        if options is not None:
            arguments["transformer_options"] = options
        choice = None if self.file is None else self.file.under(options)
        if choice is not None and choice.trace is not None:
            choice = choice._replace(trace=choice.trace.part(samples, whole))
        return Call(streams=streams, samples=samples, choice=choice, arguments=arguments, whole=whole)

    @torch.compiler.disable
    def leave(self, call: Call, found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = found if isinstance(found, tuple) else (found,)
        if call.whole:
            outputs = select_rows(outputs, call.samples)
        pairs = zip(call.streams, outputs, strict=True)
        return tuple(scatter_rows(stream, output, call.samples) for stream, output in pairs)


def patched(options: Mapping[str, Any] | None) -> bool:
    """Whether another pack has a say in the attention. It may tell samples by their place in the batch (prompts and
    negative prompts, say), so it has to be shown the whole batch."""
    options = options or {}
    return "optimized_attention_override" in options or any(options.get("patches", {}).values())


@functools.cache
def apart(block_class: Any) -> type[nn.Module]:
    """The class of a block that is compiled by itself, from that of one that is compiled with all the others."""
    double = issubclass(block_class, DoubleStreamBlock)
    stock: Any = DoubleStreamBlock if double else SingleStreamBlock
    names = tuple(inspect.signature(stock.forward).parameters)[1:]
    of_kind = {"names": names, "streams": ("img", "txt") if double else ("x",)}
    return type(f"Apart{block_class.__name__}", (ApartBlock, block_class), of_kind)

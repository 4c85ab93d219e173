"""Block groups (Mixture of Blocks, see d2m_model/mob.py) in ComfyUI's own FLUX.

A block of a group stays ComfyUI's block, at its index and with its arguments. It runs on the samples that chose it; the
streams of the others it returns unchanged, or as its stand-ins leave them (d2m_model/stand_ins.py). The choice is made at
the group's first block, from the streams before it, and kept in the options of the one evaluation that it belongs to,
where the group's other blocks find it (see settings.complete_options).

torch.compile: the host must know which samples run a block before it can leave out the others, so a graph breaks at
every group. ComfyUI's loop over the blocks then runs uncompiled, and each block is a graph of its own.
TorchCompileModel leaves transformer_options out of its guards, so such a graph would keep the settings and choices that
it was traced with. Therefore the entry of these blocks is outside of all graphs (`BlockCompiledApart`): it reads the
settings and choices, and passes on what a graph needs as arguments, which are guarded.

Shapes: B batch, T tokens, H hidden size, M blocks of a group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from ...d2m_model.stand_ins import group_stand_ins
from .settings import CHOSEN_KEY, CallSettings, FileSettings, active_blocks, complete_options, settings_of
from .weights import router_linear, router_weights

# By group: the samples of each of its blocks; None if the group has chosen more than once.
GroupChoices = dict[int, list[SampleSubset] | None]


class BlockGroupRouter(nn.Module):
    """The router of `groups[index]`: `router_x` and `router_y`, as they are named in the file."""

    def __init__(
        self,
        groups: Sequence[BlockGroup],
        index: int,
        stored: Mapping[str, Tensor],
        device: torch.device | None,
        *,
        stand_ins: bool,
    ) -> None:
        super().__init__()
        self.groups, self.index = tuple(groups), index
        self.router_x = router_linear(stored[f"block_groups.{index}.router_x.weight"], False, device)
        self.router_y = router_linear(stored[f"block_groups.{index}.router_y.weight"], False, device)

        def linear(name: str) -> nn.Linear:
            return router_linear(stored[f"{name}.weight"], f"{name}.bias" in stored, device)

        self.stand_ins = group_stand_ins(index, groups[index], linear) if stand_ins else None

    def samples(
        self, position: int, streams: Sequence[Tensor], vec_BH: Tensor, options: Mapping[str, Any]
    ) -> SampleSubset:
        """Return the samples that run the group's block at `position`.

        The first block of the group that runs chooses for all of them. That is the block at position 0, unless another
        pack has replaced it. A block without a choice for its batch makes its own: packs may call blocks with a part of
        the batch.
        """
        batch = streams[0].shape[0]
        choices: GroupChoices | None = options.get(CHOSEN_KEY)
        earlier = None if choices is None or position == 0 else choices.get(self.index)
        if earlier is not None and earlier[position].batch == batch:
            return earlier[position]
        samples = samples_per_block(self.route(streams, vec_BH, options))
        if choices is not None and (position == 0 or self.index not in choices):
            # A first block that runs twice in one evaluation gets the batch in parts: no choice is for all of it.
            choices[self.index] = None if self.index in choices else samples
        return samples[position]

    def route(self, streams: Sequence[Tensor], vec_BH: Tensor, options: Mapping[str, Any]) -> BlockRouting:
        x_MH, _ = router_weights(self.router_x, vec_BH.device)
        y_MH, _ = router_weights(self.router_y, vec_BH.device)
        active = active_blocks(settings_of(options).get("active_blocks"), self.groups)[self.index]
        selection = self.groups[self.index].selection
        routing = route_blocks(mean_tokens(*streams), vec_BH, x_MH, y_MH, active, selection)
        if (trace := settings_of(options).get("trace")) is not None:
            trace.blocks(self.index, routing)
        return routing


# Blocks


@dataclass(slots=True)
class PreparedCall:
    """One call of a block: the streams that it got, the samples that it runs on, and the arguments for these."""

    streams: tuple[Tensor, ...]
    samples: SampleSubset
    settings: CallSettings | None  # None for a dense block
    arguments: dict[str, Any]
    whole: bool  # the arguments are those of the whole batch


class BlockCompiledApart:
    """Mixin for the blocks of a FLUX-MoE that is compiled block by block."""

    names: tuple[str, ...]  # of the positional arguments
    streams: tuple[str, ...]  # names of the arguments that it returns
    file: FileSettings | None = None
    place: tuple[BlockGroupRouter, int] | None = (
        None  # router of the group (in a tuple, so that it is no child module) and position
    )

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.enter(args, kwargs)
        if call.samples.count == 0:
            streams = self.skipped(call)
        elif call.settings is None:
            streams = self.leave(call, super().forward(**call.arguments))  # type: ignore[misc]
        else:
            streams = self.leave(call, self.run(call.settings, **call.arguments))  # type: ignore[attr-defined]
        return streams if len(streams) > 1 else streams[0]

    @torch.compiler.disable
    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PreparedCall:
        """Read settings and choices, and select the samples that the block runs on."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        options = arguments.pop("transformer_options", None)
        complete = complete_options(options)
        streams = tuple(arguments[name] for name in self.streams)
        batch = streams[0].shape[0]
        samples, whole = SampleSubset(batch=batch, count=batch, index_S=None), False
        if self.place is not None:
            group, position = self.place
            samples = group.samples(position, streams, arguments["vec"], complete)
            whole = samples.index_S is not None and has_attention_patches(options)
        if whole:  # clones, since blocks write in place
            arguments |= {name: stream.clone() for name, stream in zip(self.streams, streams, strict=True)}
        else:
            arguments = select_rows(arguments, samples)
        if options is not None:
            arguments["transformer_options"] = options
        settings = None if self.file is None else self.file.under(complete)
        if settings is not None and settings.trace is not None:
            settings = settings._replace(trace=settings.trace.part(samples, whole))
        return PreparedCall(streams=streams, samples=samples, settings=settings, arguments=arguments, whole=whole)

    @torch.compiler.disable
    def skipped(self, call: PreparedCall) -> tuple[Tensor, ...]:
        """Return the streams of samples that skip the block."""
        if self.place is None or self.place[0].stand_ins is None:
            return call.streams
        group, position = self.place
        assert group.stand_ins is not None
        stand_ins: Any = group.stand_ins[position]
        skipped: tuple[Tensor, ...] = stand_ins.skip(call.streams, tuple(stand_ins))
        return skipped

    @torch.compiler.disable
    def leave(self, call: PreparedCall, output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the streams, with the block's output for the samples that it ran on."""
        outputs = output if isinstance(output, tuple) else (output,)
        if call.whole:
            outputs = select_rows(outputs, call.samples)
        others = call.streams if call.samples.index_S is None else self.skipped(call)
        pairs = zip(others, outputs, strict=True)
        return tuple(scatter_rows(stream, output, call.samples) for stream, output in pairs)


def has_attention_patches(options: Mapping[str, Any] | None) -> bool:
    """Return whether another pack changes the attention.

    It may tell samples (such as prompts and negative prompts) by their index in the batch, so it needs the whole batch.
    """
    options = options or {}
    return "optimized_attention_override" in options or any(options.get("patches", {}).values())


@functools.cache
def compiled_apart(block_class: Any) -> type[nn.Module]:
    """Return the class of a block that is compiled by itself, from the class of one that is compiled with the model."""
    double = issubclass(block_class, DoubleStreamBlock)
    stock: Any = DoubleStreamBlock if double else SingleStreamBlock
    names = tuple(inspect.signature(stock.forward).parameters)[1:]
    attributes = {"names": names, "streams": ("img", "txt") if double else ("x",)}
    return type(f"{block_class.__name__}CompiledApart", (BlockCompiledApart, block_class), attributes)

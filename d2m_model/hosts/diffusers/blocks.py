"""diffusers' two kinds of blocks in a model with block groups (Eq. 4-5): a block of a group runs where it is chosen.

Their forward is diffusers' own. The choices of the current call travel in the keyword arguments for attention, under
ROUTINGS, and are taken out before diffusers sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor

from ...mob import SampleSubset, alone, masked, mean_tokens, scatter_rows, select_rows
from ...moe import recomputed
from .modules import GroupMember, GroupRoutings

ROUTINGS = "d2m_routings"

Streams = tuple[Tensor, Tensor]  # text and image


class RoutedTransformerBlock(FluxTransformerBlock):
    """A double block. `member` is None for a block that is in no group."""

    member: GroupMember | None = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return _run_where_chosen(
            self, super().forward, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )


class RoutedSingleTransformerBlock(FluxSingleTransformerBlock):
    """A single block. `member` is None for a block that is in no group."""

    member: GroupMember | None = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return _run_where_chosen(
            self, super().forward, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )


def _run_where_chosen(
    block: RoutedTransformerBlock | RoutedSingleTransformerBlock,
    dense: Callable[..., tuple[Tensor, Tensor]],
    image_BTH: Tensor,
    text_BLH: Tensor,
    temb_BH: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    joint_attention_kwargs: dict[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """Return (text, image), in the order of diffusers' blocks; samples that did not choose this block have its
    stand-ins, if the file has some, and are unchanged otherwise."""
    attention = dict(joint_attention_kwargs or {})
    routings: GroupRoutings | None = attention.pop(ROUTINGS, None)

    def run(text: Tensor, image: Tensor, *, temb: Tensor, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # All samples share `rotary`. It is bound here because select_rows would take it for a tensor with one row
        # per sample if the batch were as large as the number of tokens.
        return dense(image, text, temb, image_rotary_emb=rotary, joint_attention_kwargs=attention)

    member, streams = block.member, (text_BLH, image_BTH)
    if member is None or routings is None:
        return run(*streams, temb=temb_BH, attention=attention)
    if not block.training:
        return _run_on_samples(member, routings, run, streams, temb=temb_BH, attention=attention)
    _route(member, routings, streams, temb_BH)
    routing, compared = routings.by_group[member.group], routings.comparing(member, streams)
    if compared is None:
        outputs = run(*streams, temb=temb_BH, attention=attention)
    else:
        outputs = run(*alone(routing, member.position, streams, compared.given), temb=temb_BH, attention=attention)
        if not recomputed():
            compared.after.append(outputs)
    text, image = masked(routing, member.position, routings.skipped(member, streams), outputs)
    return text, image


def _route(member: GroupMember, routings: GroupRoutings, streams: Streams, temb_BH: Tensor) -> None:
    """Choose the group's blocks, if this is its first."""
    if member.position == 0:
        text_BLH, image_BTH = streams
        routings.route(member.group, mean_tokens(image_BTH, text_BLH), temb_BH)


# Under torch.compile: the host must know which samples run a block, so a graph breaks here, and the block is a graph of
# its own. Choosing and selecting stay outside of graphs, which would be made again for every choice.


@torch.compiler.disable(recursive=False)
def _run_on_samples(
    member: GroupMember, routings: GroupRoutings, run: Callable[..., Streams], streams: Streams, **conditions: Any
) -> Streams:
    samples, selected, conditions = _enter(member, routings, streams, conditions)
    if samples.count == 0:
        return _skip(member, routings, streams)
    outputs = run(*selected, **conditions)
    others = streams if samples.index_S is None else _skip(member, routings, streams)
    return _leave(samples, others, outputs)


@torch.compiler.disable
def _enter(
    member: GroupMember, routings: GroupRoutings, streams: Streams, conditions: dict[str, Any]
) -> tuple[SampleSubset, Streams, dict[str, Any]]:
    _route(member, routings, streams, conditions["temb"])
    samples = routings.samples(member)
    if samples.count == 0:
        return samples, streams, conditions
    return samples, select_rows(streams, samples), select_rows(conditions, samples)


@torch.compiler.disable
def _skip(member: GroupMember, routings: GroupRoutings, streams: Streams) -> Streams:
    return routings.skipped(member, streams)


@torch.compiler.disable
def _leave(samples: SampleSubset, streams: Streams, outputs: Streams) -> Streams:
    text, image = (scatter_rows(stream, new, samples) for stream, new in zip(streams, outputs, strict=True))
    return text, image


with suppress(ImportError):  # block caches (enable_cache) look up in this registry what a block returns
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    for kind in (RoutedTransformerBlock, RoutedSingleTransformerBlock):
        TransformerBlockRegistry.register(
            kind, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
        )

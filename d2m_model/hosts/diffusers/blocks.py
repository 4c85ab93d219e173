"""diffusers' two kinds of blocks in a model with block groups (Eq. 4-5): a block of a group runs where it is chosen.

Their forward is diffusers' own. The choices of the current call travel in the keyword arguments for attention, under
ROUTINGS, and are taken out before diffusers sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor

from ...mob import masked, mean_tokens, run_on
from .modules import GroupMember, GroupRoutings

ROUTINGS = "d2m_routings"


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
    """Return (text, image), in the order of diffusers' blocks; samples that did not choose this block are unchanged."""
    attention = dict(joint_attention_kwargs or {})
    routings: GroupRoutings | None = attention.pop(ROUTINGS, None)

    def run(text: Tensor, image: Tensor, *, temb: Tensor, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # All samples share `rotary`. It is bound here because select_rows would take it for a tensor with one row
        # per sample if the batch were as large as the number of tokens.
        return dense(image, text, temb, image_rotary_emb=rotary, joint_attention_kwargs=attention)

    member = block.member
    if member is None or routings is None:
        return run(text_BLH, image_BTH, temb=temb_BH, attention=attention)
    streams = (text_BLH, image_BTH)
    if member.position == 0:
        routings.route(member.group, mean_tokens(image_BTH, text_BLH), temb_BH)
    if block.training:
        outputs = run(*streams, temb=temb_BH, attention=attention)
        text, image = masked(routings.by_group[member.group], member.position, streams, outputs)
    else:
        text, image = run_on(routings.samples(member), run, streams, temb=temb_BH, attention=attention)
    return text, image


with suppress(ImportError):  # block caches (enable_cache) look up in this registry what a block returns
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    for kind in (RoutedTransformerBlock, RoutedSingleTransformerBlock):
        TransformerBlockRegistry.register(
            kind, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
        )

"""diffusers' two kinds of blocks in a model with block groups (Eq. 4-5): those of a group run where they are chosen.

Their forward is diffusers' own. What was chosen in this call comes with the keyword arguments for attention, under
CHOICES, and is taken out before diffusers sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor

from ...mob import masked, mean_tokens, run_on
from .modules import Choices, Member

CHOICES = "d2m_choices"


class RoutedTransformerBlock(FluxTransformerBlock):
    """A double block. `member` is None for one that is in no group."""

    member: Member | None = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return _where_chosen(
            self, super().forward, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )


class RoutedSingleTransformerBlock(FluxSingleTransformerBlock):
    """A single block. `member` is None for one that is in no group."""

    member: Member | None = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return _where_chosen(
            self, super().forward, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )


def _where_chosen(
    block: RoutedTransformerBlock | RoutedSingleTransformerBlock,
    dense: Callable[..., tuple[Tensor, Tensor]],
    image_BTH: Tensor,
    text_BLH: Tensor,
    temb_BH: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    joint_attention_kwargs: dict[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """(text, image), as diffusers' blocks return them; those of samples that did not choose this block, unchanged."""
    attention = dict(joint_attention_kwargs or {})
    choices: Choices | None = attention.pop(CHOICES, None)

    def run(text: Tensor, image: Tensor, *, temb: Tensor, attention: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # `rotary` is every sample's; a batch as large as there are tokens must not make it look like one's own.
        return dense(image, text, temb, image_rotary_emb=rotary, joint_attention_kwargs=attention)

    member = block.member
    if member is None or choices is None:
        return run(text_BLH, image_BTH, temb=temb_BH, attention=attention)
    streams = (text_BLH, image_BTH)
    if member.block == 0:
        choices.route(member.group, mean_tokens(image_BTH, text_BLH), temb_BH)
    if block.training:
        found = run(*streams, temb=temb_BH, attention=attention)
        text, image = masked(choices.routings[member.group], member.block, streams, found)
    else:
        text, image = run_on(choices.samples_of(member), run, streams, temb=temb_BH, attention=attention)
    return text, image


with suppress(ImportError):  # caches of blocks (enable_cache) ask there what a block returns
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    for kind in (RoutedTransformerBlock, RoutedSingleTransformerBlock):
        TransformerBlockRegistry.register(
            kind, TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
        )

"""Block outputs of a FLUX in diffusers, recorded during a `with`: the features that Eq. 8 compares.

Shapes: B batch, T image and L text tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2m_model.blocks import Block

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


@contextmanager
def block_outputs(model: FluxTransformer2DModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the blocks `names` (in BFL's style) during the `with`.

    A double block has two entries, `<name>.img` [B, T, H] and `<name>.txt` [B, L, H]; a single block has one, [B, L + T, H].
    Only the first forward pass counts: under gradient checkpointing a block runs again for the backward pass, and its
    second output must not replace the first.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        outputs.setdefault(name, tensor)

    def hook_of(name: str) -> Any:
        streams = stream_names(name)

        def hook(_: nn.Module, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            text, image = output
            features = (image, text) if len(streams) == 2 else (torch.cat([text, image], dim=1),)
            for stream, tensor in zip(streams, features, strict=True):
                keep(stream, tensor)

        return hook

    handles = [find_block(model, name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def find_block(model: FluxTransformer2DModel, name: str) -> nn.Module:
    """Return the block with a BFL name, or the block that contains the named FFN."""
    block = Block.parse(name)
    if block is None:
        raise ValueError(f"{name!r} is not the name of a block.")
    return model.get_submodule(block.diffusers_name)


def stream_names(name: str) -> tuple[str, ...]:
    """The entries that `block_outputs` has for a block."""
    block = Block.parse(name)
    return (f"{name}.img", f"{name}.txt") if block is not None and block.kind == "double" else (name,)

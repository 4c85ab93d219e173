"""Stand-ins of skipped blocks: what is added to the streams of a sample that does not run a block of its group.

A block of a group changes each of its streams x. A sample that skips the block has instead

    x + W_up W_down norm(x) + b,

where norm is FLUX's layer norm without scale and shift, and W_up W_down has rank R. ReplaceMe fits such linear maps for
the pruned blocks of language models; conversion/stand_in_fit.py fits these. A block that runs has no stand-in, so that
stand-ins do nothing where all blocks of a group are active.

Shapes: B batch, T tokens, H hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Stream
from .config import BlockGroup
from .tensor_file import Shape

_EPSILON = 1e-6  # of FLUX's layer norms


def streams_of(block: Block) -> tuple[Stream, ...]:
    """Return the streams that a block changes: image and text of a double block, the joint one of a single block."""
    return tuple(ffn.stream for ffn in block.ffns)


def stand_in_rank_of(hidden_size: int) -> int:
    """Return the rank that a conversion gives to stand-ins: a quarter of the hidden size."""
    return hidden_size // 4


def stand_in_shapes(index: int, group: BlockGroup, hidden_size: int, rank: int) -> dict[str, Shape]:
    """Return the tensors of the stand-ins of `groups[index]` by their names in the file."""
    shapes: dict[str, Shape] = {}
    for position, block in enumerate(group.members):
        for stream in streams_of(block):
            name = f"block_groups.{index}.stand_ins.{position}.{stream}"
            shapes[f"{name}.down.weight"] = (rank, hidden_size)
            shapes[f"{name}.up.weight"] = (hidden_size, rank)
            shapes[f"{name}.up.bias"] = (hidden_size,)
    return shapes


def normed(x_BTH: Tensor) -> Tensor:
    """Return what a stand-in multiplies: the stream under FLUX's layer norm, without scale and shift."""
    return F.layer_norm(x_BTH, x_BTH.shape[-1:], eps=_EPSILON)


class StandIn(nn.Module):
    """The stand-in of a block for one stream: layers `down` [R, H] and `up` [H, R] with a bias b [H]."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x_BTH: Tensor) -> Tensor:
        changed: Tensor = x_BTH + self.up(self.down(normed(x_BTH)))
        return changed


class BlockStandIns(nn.ModuleDict):
    """The stand-ins of a block by stream."""

    def skip(self, streams: Sequence[Tensor], names: Sequence[Stream]) -> tuple[Tensor, ...]:
        """Return the streams as they are where the block is skipped. `names` are those of `streams`."""
        return tuple(self[name](stream) for name, stream in zip(names, streams, strict=True))


def group_stand_ins(index: int, group: BlockGroup, linear: Callable[[str], nn.Linear]) -> nn.ModuleList:
    """Return the stand-ins of `groups[index]`, by position. `linear` makes a layer by its name in the file."""
    stand_ins = nn.ModuleList()
    for position, block in enumerate(group.members):
        by_stream = BlockStandIns()
        for stream in streams_of(block):
            name = f"block_groups.{index}.stand_ins.{position}.{stream}"
            by_stream[stream] = StandIn(linear(f"{name}.down"), linear(f"{name}.up"))
        stand_ins.append(by_stream)
    return stand_ins

"""Depth pruning: a dense FLUX.1 without some of its blocks, before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..blocks import Block, BlockKind
from ..config import BlockGroup, FluxDims
from ..teacher import DenseTeacher
from .block_routers import BlockChange

TeacherBlocks = dict[BlockKind, list[int]]  # the teacher's block for each block of the shallow FLUX


def kept_blocks(dims: FluxDims, groups: Sequence[BlockGroup], change: Mapping[str, BlockChange]) -> TeacherBlocks:
    """Return the blocks to keep: all blocks outside of groups, and the `active` blocks of each group that change the image
    most. As many blocks as run with the groups."""
    dropped: set[Block] = set()
    for group in groups:
        ranked = sorted(group.members, key=lambda block: -change[block.name].image_mse)
        dropped.update(ranked[group.active :])
    return {
        kind: [index for index in range(depth) if Block(kind, index) not in dropped]
        for kind, depth in dims.depths.items()
    }


def output_blocks(groups: Sequence[BlockGroup], kept: TeacherBlocks) -> TeacherBlocks:
    """Return the teacher's block whose output each kept block learns to give: the last of the blocks that it replaces.

    In a group, a kept block replaces those up to the next kept block, and the last kept block those up to the group's end.
    """
    outputs: TeacherBlocks = {}
    for kind, indices in kept.items():
        last = {index: group.indices[-1] for group in groups if group.kind == kind for index in group.indices}
        outputs[kind] = [
            following - 1 if last.get(index) == last.get(following, -1) else last.get(index, index)
            for index, following in zip(indices, [*indices[1:], -1], strict=True)
        ]
    return outputs


def teacher_name(name: str, kept: TeacherBlocks) -> str:
    """Return the teacher's name of a tensor or FFN of the shallow FLUX."""
    block = Block.parse(name)
    if block is None:
        return name
    return Block(block.kind, kept[block.kind][block.index]).name + name.removeprefix(block.name)


class ShallowTeacher:
    """View of a DenseTeacher with the blocks of `kept` alone, renumbered without gaps. Does not close the teacher."""

    def __init__(self, teacher: DenseTeacher, kept: TeacherBlocks) -> None:
        self._teacher = teacher
        self.path, self.files, self.size = teacher.path, teacher.files, teacher.size
        self.metadata, self.notes = teacher.metadata, teacher.notes
        self.dims = teacher.dims.with_depths(double=len(kept["double"]), single=len(kept["single"]))
        numbered = {
            Block(kind, index): Block(kind, number)
            for kind, indices in kept.items()
            for number, index in enumerate(indices)
        }
        self._sources: dict[str, str] = {}  # in the teacher's order
        for name in teacher.shapes:
            block = Block.parse(name)
            if block is None:
                self._sources[name] = name
            elif block in numbered:
                self._sources[numbered[block].name + name.removeprefix(block.name)] = name
        self.shapes = {name: teacher.shapes[source] for name, source in self._sources.items()}
        self.dtypes = {name: teacher.dtypes[source] for name, source in self._sources.items()}

    def tensor(self, name: str) -> Tensor:
        return self._teacher.tensor(self._sources[name])

    def span(self, name: str) -> tuple[int, int]:
        return self._teacher.span(self._sources[name])

    def release(self, name: str) -> None:
        self._teacher.release(self._sources[name])

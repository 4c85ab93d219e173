"""A dense FLUX.1 with some of its blocks left out: what depth pruning makes of a teacher before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from ..config import BlockGroup, FluxDims
from ..teacher import DenseTeacher
from .block_routers import BlockChange
from .groups import block_name

TeacherBlocks = dict[Literal["double", "single"], list[int]]  # position in the shallow FLUX -> block of the teacher


def kept_blocks(dims: FluxDims, groups: Sequence[BlockGroup], change: Mapping[str, BlockChange]) -> TeacherBlocks:
    """Of every group its `active` blocks that change the image most, and all blocks that no group has: as many as run
    with the groups."""
    dropped: set[tuple[str, int]] = set()
    for group in groups:
        blocks = range(group.first, group.first + group.blocks)
        ranked = sorted(blocks, key=lambda index: -change[block_name(group.kind, index)].image_mse)
        dropped |= {(group.kind, index) for index in ranked[group.active :]}
    return {
        "double": [index for index in range(dims.double_blocks) if ("double", index) not in dropped],
        "single": [index for index in range(dims.single_blocks) if ("single", index) not in dropped],
    }


def outputs_of(groups: Sequence[BlockGroup], kept: TeacherBlocks) -> TeacherBlocks:
    """Of every kept block the teacher's block whose output it is to give once trained: the last that it stands for.

    In a group that is the one ahead of the next kept block, and of the last kept one the group's last.
    """
    outputs: TeacherBlocks = {}
    for kind, indices in kept.items():
        last = {
            index: group.first + group.blocks - 1
            for group in groups
            if group.kind == kind
            for index in range(group.first, group.first + group.blocks)
        }
        outputs[kind] = [
            following - 1 if last.get(index) == last.get(following, -1) else last.get(index, index)
            for index, following in zip(indices, [*indices[1:], -1], strict=True)
        ]
    return outputs


def teacher_name(name: str, kept: TeacherBlocks) -> str:
    """The teacher's name of a shallow FLUX's tensor or FFN."""
    found = re.match(r"(double|single)_blocks\.(\d+)(?=\.|$)", name)
    if found is None:
        return name
    kind: Literal["double", "single"] = "double" if found[1] == "double" else "single"
    return block_name(kind, kept[kind][int(found[2])]) + name[found.end() :]


class ShallowTeacher:
    """A DenseTeacher seen with the blocks of `kept` alone, renumbered without gaps. It does not own the teacher."""

    def __init__(self, teacher: DenseTeacher, kept: TeacherBlocks) -> None:
        self._teacher = teacher
        self.path, self.files, self.size = teacher.path, teacher.files, teacher.size
        self.metadata, self.notes = teacher.metadata, teacher.notes
        self.dims = replace(teacher.dims, double_blocks=len(kept["double"]), single_blocks=len(kept["single"]))
        places = {
            block_name(kind, index): block_name(kind, place)
            for kind, indices in kept.items()
            for place, index in enumerate(indices)
        }
        self._sources: dict[str, str] = {}  # in the teacher's order
        for name in teacher.shapes:
            block = re.match(r"(double|single)_blocks\.\d+", name)
            if block is None:
                self._sources[name] = name
            elif block[0] in places:
                self._sources[places[block[0]] + name[block.end() :]] = name
        self.shapes = {name: teacher.shapes[source] for name, source in self._sources.items()}
        self.dtypes = {name: teacher.dtypes[source] for name, source in self._sources.items()}

    def tensor(self, name: str) -> Tensor:
        return self._teacher.tensor(self._sources[name])

    def span(self, name: str) -> tuple[int, int]:
        return self._teacher.span(self._sources[name])

    def release(self, name: str) -> None:
        self._teacher.release(self._sources[name])

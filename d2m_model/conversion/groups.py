"""Choice of the block groups (Mixture of Blocks): a preset's, those that change least, or the user's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..blocks import BLOCK_KINDS, Block
from ..config import BlockGroup, FluxDims, PresetName, Selection, dense_doubles, preset_groups
from ..fields import ConfigError
from .block_routers import BlockChange

SYNTAX = "kind:first-last/active, such as double:4-6/1 or single:10-14 (active is then the default)"


def with_choice(groups: Sequence[BlockGroup], active: int, selection: Selection) -> tuple[BlockGroup, ...]:
    """Return the groups with another number of active blocks and another selection."""
    return tuple(replace(group, active=active, selection=selection) for group in groups)


def parse_groups(texts: Sequence[str], active: int, selection: Selection) -> tuple[BlockGroup, ...]:
    """Parse groups in the form of SYNTAX, both ends included. Raises ConfigError for another form or a single block."""
    groups = []
    for text in texts:
        match = re.fullmatch(r"\s*(double|single):(\d+)-(\d+)(?:/(\d+))?\s*", text)
        if match is None:
            raise ConfigError(f"{text!r} is not a block group; expected {SYNTAX}.")
        kind, (first, last) = match[1], (int(match[2]), int(match[3]))
        if last <= first:
            raise ConfigError(f"{text!r} has {max(0, last - first + 1)} blocks; expected two or more, first to last.")
        groups.append(
            BlockGroup(
                kind="double" if kind == "double" else "single",
                first=first,
                blocks=last - first + 1,
                active=active if match[4] is None else int(match[4]),
                selection=selection,
            )
        )
    return tuple(groups)


def auto_groups(preset: PresetName, dims: FluxDims, change: Mapping[str, BlockChange]) -> tuple[BlockGroup, ...]:
    """Place the preset's groups, the same number of each kind and size, on the blocks that change least (Fig. 3).

    `change` is by block name. The placement with the lowest sum of image_mse is chosen, so that the blocks that change
    most stay out of groups; so do the preset's dense double blocks.
    """
    groups: list[BlockGroup] = []
    given = preset_groups(preset, dims)
    for kind in BLOCK_KINDS:
        of_kind = [group for group in given if group.kind == kind]
        if of_kind:
            first = dense_doubles(dims) if kind == "double" else 0
            costs = [change[Block(kind, index).name].image_mse for index in range(first, dims.depths[kind])]
            starts = least_runs(costs, len(of_kind), of_kind[0].blocks)
            groups += [replace(group, first=first + start) for group, start in zip(of_kind, starts, strict=True)]
    return tuple(groups)


def least_runs(costs: Sequence[float], runs: int, length: int) -> list[int]:
    """Return the starts of `runs` disjoint runs of `length` neighbours with the lowest total cost."""
    if runs * length > len(costs):
        raise ValueError(f"{runs} runs of {length} do not fit into {len(costs)}.")
    # best[r][i]: (cost, starts) of the best r runs within the first i costs.
    best: list[list[tuple[float, list[int]] | None]] = [[(0.0, [])] * (len(costs) + 1)]
    for _ in range(runs):
        row: list[tuple[float, list[int]] | None] = [None] * length
        for end in range(length, len(costs) + 1):
            options = [row[end - 1]] if end > length else []
            before = best[-1][end - length]
            if before is not None:
                begin = end - length
                options.append((before[0] + sum(costs[begin:end]), [*before[1], begin]))
            row.append(min((option for option in options if option is not None), default=None, key=lambda o: o[0]))
        best.append(row)
    cheapest = best[-1][-1]
    assert cheapest is not None
    return cheapest[1]

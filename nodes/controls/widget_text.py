"""Parsing of the text widgets: a schedule's pieces, a mask's rules and the numbers of active blocks.

Texts have one item per line, and `#` begins a comment. Parsing does not depend on the FLUX-MoE file. Every error
names the line, what stands there and what was expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PIECE = re.compile(rf"{_NUMBER}\s*(%?)\s*-\s*{_NUMBER}\s*(%?)\s*:\s*(\S.*)")
_WEIGHT = re.compile(rf"(\d+|\*)\s*=\s*{_NUMBER}")


class SchedulePiece(NamedTuple):
    """A span of the schedule and the value that applies in it, as written."""

    start: float
    end: float
    value: str
    percent_sign: bool  # start or end is written with a % sign
    line: int


class MaskRule(NamedTuple):
    """Weights of experts in the FFNs whose names match `blocks`. The key None stands for every expert."""

    blocks: str
    weights: dict[int | None, float]
    line: int


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) for each line that is not empty once comments are removed."""
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if content:
            yield number, content


def parse_schedule(text: str) -> list[SchedulePiece]:
    """Parse lines `START - END: VALUE`. Raises ValueError."""
    pieces = []
    for number, content in _numbered_lines(text):
        match = _PIECE.fullmatch(content)
        if match is None:
            raise ValueError(f"Line {number} of pieces is {content!r}; expected START - END: VALUE, such as 0 - 40: 4.")
        start, start_sign, end, end_sign, value = match.groups()
        pieces.append(SchedulePiece(float(start), float(end), value.strip(), bool(start_sign or end_sign), number))
    return pieces


def parse_mask(text: str) -> list[MaskRule]:
    """Parse lines `BLOCKS: EXPERT=WEIGHT[, EXPERT=WEIGHT…]`. Raises ValueError."""
    rules = []
    for number, content in _numbered_lines(text):
        blocks, colon, assignments = content.partition(":")
        if not colon or not blocks.strip():
            raise ValueError(
                f"Line {number} of mask is {content!r}; expected BLOCKS: EXPERT=WEIGHT, such as single_blocks.*: 3=0."
            )
        weights: dict[int | None, float] = {}
        for assignment in assignments.split(","):
            match = _WEIGHT.fullmatch(assignment.strip())
            if match is None or not math.isfinite(float(match[2])):
                raise ValueError(
                    f"Line {number} of mask has {assignment.strip()!r}; expected EXPERT=WEIGHT, where EXPERT is a number "
                    "or * and WEIGHT is 0 or more, such as 3=0 (mute) or *=0.5."
                )
            weights[None if match[1] == "*" else int(match[1])] = float(match[2])
        rules.append(MaskRule(blocks.strip(), weights, number))
    return rules


def parse_block_counts(text: str) -> list[int]:
    """Parse numbers of active blocks such as `1,0,2`. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,4}", part) for part in parts):
        raise ValueError(f"{text!r} is not a list of whole numbers; expected one for each block group, such as 1,0,2.")
    return [int(part) for part in parts]

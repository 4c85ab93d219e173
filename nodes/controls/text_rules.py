"""The small languages of the text widgets: what a schedule's pieces and a mask's rules say, whatever the file.

One to a line; `#` begins a comment. Every error names the line, what stands there and what was expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PIECE = re.compile(rf"{_NUMBER}\s*(%?)\s*-\s*{_NUMBER}\s*(%?)\s*:\s*(\S.*)")
_WEIGHT = re.compile(rf"(\d+|\*)\s*=\s*{_NUMBER}")


class Piece(NamedTuple):
    """A span of the schedule and what holds in it, as written."""

    start: float
    end: float
    value: str
    signed: bool  # a % sign stands with it
    line: int


class Rule(NamedTuple):
    """Weights of experts, for the FFNs whose names match `blocks`. None is every expert."""

    blocks: str
    weights: dict[int | None, float]
    line: int


def lines(text: str) -> Iterator[tuple[int, str]]:
    """What is written, with its line's number."""
    for number, line in enumerate(text.splitlines(), 1):
        said = line.partition("#")[0].strip()
        if said:
            yield number, said


def pieces_of(text: str) -> list[Piece]:
    """Of lines `START - END: VALUE`. Raises ValueError."""
    found = []
    for number, said in lines(text):
        match = _PIECE.fullmatch(said)
        if match is None:
            raise ValueError(f"Line {number} of pieces is {said!r}; expected START - END: VALUE, such as 0 - 40: 4.")
        start, start_sign, end, end_sign, value = match.groups()
        found.append(Piece(float(start), float(end), value.strip(), bool(start_sign or end_sign), number))
    return found


def rules_of(text: str) -> list[Rule]:
    """Of lines `BLOCKS: EXPERT=WEIGHT[, EXPERT=WEIGHT…]`. Raises ValueError."""
    found = []
    for number, said in lines(text):
        blocks, colon, weighed = said.partition(":")
        if not colon or not blocks.strip():
            raise ValueError(
                f"Line {number} of mask is {said!r}; expected BLOCKS: EXPERT=WEIGHT, such as single_blocks.*: 3=0."
            )
        weights: dict[int | None, float] = {}
        for part in weighed.split(","):
            match = _WEIGHT.fullmatch(part.strip())
            if match is None or not math.isfinite(float(match[2])):
                raise ValueError(
                    f"Line {number} of mask has {part.strip()!r}; expected EXPERT=WEIGHT, where EXPERT is a number or * "
                    "and WEIGHT is 0 or more, such as 3=0 (mute) or *=0.5."
                )
            weights[None if match[1] == "*" else int(match[1])] = float(match[2])
        found.append(Rule(blocks.strip(), weights, number))
    return found


def numbers_of(text: str) -> list[int]:
    """Of `1,0,2`. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,4}", part) for part in parts):
        raise ValueError(f"{text!r} is no list of whole numbers; expected one for each block group, such as 1,0,2.")
    return [int(part) for part in parts]

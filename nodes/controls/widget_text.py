"""Parsing of the text widgets: a schedule's pieces, a mask's rules and the numbers of active blocks.

Texts have one item per line, and `#` begins a comment. Parsing does not depend on the FLUX-MoE file. Every error
names the line, what stands there and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_TEXT = 20_000  # characters
_SHOWN = 200  # characters of a wrong line in a message
_MAX_NUMBER = 40  # characters

# Linear in the text's length: no two parts of a pattern in a row match the same characters.
_NUMBER = r"(\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})"
_PIECE = re.compile(rf"{_NUMBER}\s*(?:(%)\s*)?-\s*{_NUMBER}\s*(?:(%)\s*)?:\s*(\S.*)")
_WEIGHT = re.compile(rf"(\d{{1,9}}|\*)\s*=\s*{_NUMBER}")


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
    """Yield (line number, text) for each line that is not empty once comments are removed.

    Raises ValueError for a text of more than MAX_TEXT characters.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"The text has {len(text)} characters; expected {MAX_TEXT} at most.")
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
            raise ValueError(
                f"Line {number} of pieces is {content[:_SHOWN]!r}; expected START - END: VALUE, such as 0 % - 40 %: 4."
            )
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
                f"Line {number} of mask is {content[:_SHOWN]!r}; expected BLOCKS: EXPERT=WEIGHT, such as single_blocks.*: 3=0."
            )
        weights: dict[int | None, float] = {}
        for assignment in assignments.split(","):
            match = _WEIGHT.fullmatch(assignment.strip())
            if match is None:
                raise ValueError(
                    f"Line {number} of mask has {assignment.strip()[:_SHOWN]!r}; expected EXPERT=WEIGHT, where EXPERT "
                    "is a number or * and WEIGHT is 0 or more, such as 3=0 (mute) or *=0.5."
                )
            weights[None if match[1] == "*" else int(match[1])] = float(match[2])
        rules.append(MaskRule(blocks.strip(), weights, number))
    return rules


def parse_block_counts(text: str) -> list[int]:
    """Parse numbers of active blocks such as `1,0,2`. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if len(text) > MAX_TEXT or not all(re.fullmatch(r"\d{1,4}", part) for part in parts):
        raise ValueError(
            f"{text[:_SHOWN]!r} is not a list of whole numbers; expected one for each block group, such as 1,0,2."
        )
    return [int(part) for part in parts]


def parse_number(text: str, *, whole: bool) -> float:
    """Parse a number, as an int if it has to be `whole`. Raises ValueError."""
    if len(text) > _MAX_NUMBER:
        raise ValueError(f"{text[:_MAX_NUMBER]!r}… is too long for a number.")
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a {'whole ' if whole else ''}number.") from None

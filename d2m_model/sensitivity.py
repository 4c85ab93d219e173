"""Sensitivity of a FLUX-MoE: a table of the error that each FFN adds at each k, and each block group at each number of
active blocks, by noise level. It stands in the file's provenance, where older versions leave it alone.

`budget.py` spends a compute budget by it. An error is the mean square of what the missing experts or blocks change in the
model's velocity, per element.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .fields import expect, fields_of

SENSITIVITY = "sensitivity"  # key of the provenance
MAX_BINS = 8
_MAX_TOKENS = 1_000_000

Errors = tuple[tuple[float, ...], ...]  # [bins][k + 1] of an FFN, [bins][blocks + 1] of a group


@dataclass(kw_only=True, slots=True, frozen=True)
class Sensitivity:
    """Errors by noise level.

    levels         falling edges of the bins of noise levels, from 1 (noise) to 0: one more than there are bins
    image_tokens, text_tokens   of the samples that were measured
    samples        number of samples per bin
    data           their name
    ffns           errors of each FFN by name, at 0 to all of its experts per token
    groups         errors of each block group, at 0 to all of its blocks
    """

    levels: tuple[float, ...]
    image_tokens: int
    text_tokens: int
    samples: int
    data: str
    ffns: Mapping[str, Errors]
    groups: tuple[Errors, ...]

    @property
    def bins(self) -> int:
        return len(self.levels) - 1

    def entry(self) -> dict[str, Any]:
        """Return the entry of the provenance, as JSON: errors have four digits."""
        entry = asdict(self)
        entry["levels"] = [float(f"{level:.4g}") for level in self.levels]
        entry["ffns"] = {name: _shortened(errors) for name, errors in self.ffns.items()}
        entry["groups"] = [_shortened(errors) for errors in self.groups]
        return entry


def _shortened(errors: Errors) -> list[list[float]]:
    return [[float(f"{error:.4g}") for error in row] for row in errors]


def read_sensitivity(
    provenance: Mapping[str, Any], experts: Mapping[str, int], blocks: Sequence[int]
) -> Sensitivity | None:
    """Return the table in a file's provenance, None if it has none.

    `experts` are numbers of experts by FFN, `blocks` numbers of blocks of each group. Raises ConfigError for a table of
    another model.
    """
    if (entry := provenance.get(SENSITIVITY)) is None:
        return None
    where = f"provenance.{SENSITIVITY}"
    fields = fields_of(Sensitivity, entry, where)
    levels = fields["levels"]
    numbers = isinstance(levels, list) and all(_is_number(level) for level in levels)
    expect(
        numbers
        and 2 <= len(levels) <= MAX_BINS + 1
        and levels[0] <= 1
        and levels[-1] == 0
        and all(upper > lower for upper, lower in itertools.pairwise(levels)),
        f"{where}.levels",
        levels,
        f"2 to {MAX_BINS + 1} falling noise levels that begin at 1 or below and end at 0",
    )
    for name in ("image_tokens", "text_tokens", "samples"):
        expect(0 <= fields[name] <= _MAX_TOKENS, f"{where}.{name}", fields[name], f"0 to {_MAX_TOKENS}")
    expect(
        isinstance(fields["ffns"], dict) and set(fields["ffns"]) == set(experts),
        f"{where}.ffns",
        list(fields["ffns"]) if isinstance(fields["ffns"], dict) else fields["ffns"],
        "the file's FFNs",
    )
    expect(
        isinstance(fields["groups"], list) and len(fields["groups"]) == len(blocks),
        f"{where}.groups",
        fields["groups"],
        f"a list of {len(blocks)}, one for each block group",
    )
    bins = len(levels) - 1
    of_ffns = {
        name: _errors(fields["ffns"][name], bins, most, f"{where}.ffns[{name!r}]") for name, most in experts.items()
    }
    of_groups = tuple(
        _errors(entry, bins, most, f"{where}.groups[{index}]")
        for index, (entry, most) in enumerate(zip(fields["groups"], blocks, strict=True))
    )
    return Sensitivity(**fields | {"levels": tuple(levels), "ffns": of_ffns, "groups": of_groups})


def _errors(value: object, bins: int, most: int, where: str) -> Errors:
    """Return errors of `bins` noise levels at 0 to `most` experts or blocks. Raises ConfigError for anything else."""
    right = isinstance(value, list) and len(value) == bins
    right = right and all(
        isinstance(row, list) and len(row) == most + 1 and all(_is_number(error) and error >= 0 for error in row)
        for row in value  # type: ignore[attr-defined]
    )
    expect(right, where, value, f"{bins} lists of {most + 1} errors, 0 or more")
    return tuple(tuple(float(error) for error in row) for row in value)  # type: ignore[attr-defined]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

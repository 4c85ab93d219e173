"""Samples that are held out for validation: by content, so that none is trained on, and the same at every resume."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from .batch import Batch, DataSource, Progress, Texts
from .store import content_key


def choose_held_out(contents: Sequence[str], share: float) -> list[bool]:
    """Return for each sample, given by its content, whether it is held out. Equal contents are always on the same side.

    A content is held out if its hash says so, whatever other samples there are. At least one is, and at least one is not,
    unless `share` is 0 or all contents are equal: then none is held out.
    """
    places = {content: _place(content) for content in set(contents)}
    if share == 0 or len(places) < 2:
        return [False] * len(contents)
    ranked = sorted(places, key=places.__getitem__)
    count = sum(place < share for place in places.values())
    chosen = set(ranked[: min(max(1, count), len(ranked) - 1)])
    return [content in chosen for content in contents]


def _place(content: str) -> float:
    """Return a number in 0..1 that depends on the content alone."""
    return int(hashlib.sha256(f"held out {content}".encode()).hexdigest()[:13], 16) / 16**13


def split_text(count: int, held_out: int) -> str:
    """Describe a split of `count` samples."""
    if not held_out:
        return f"{count:,} samples, none of them held out: validation is on samples that are trained on."
    return f"{count:,} samples, {held_out:,} of them held out for validation."


class WithHeldOut:
    """A source of training samples with another source for validation."""

    def __init__(self, training: DataSource, validation: DataSource) -> None:
        self.training, self.validation = training, validation
        self.name = training.name
        self.identity = content_key(training.identity, validation.identity)

    def prepare(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
        self.training.prepare(rank, world, progress)
        self.validation.prepare(rank, world)

    def batch(self, index: int, size: int, seed: int, *, held_out: bool = False) -> Batch:
        return (self.validation if held_out else self.training).batch(index, size, seed)

    def split_text(self) -> str:
        return f"Validation is on samples of {self.validation.name}, which are not trained on."

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        return self.training.decode(tokens_BTC, image_ids_T3)

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        return self.training.encode_prompts(prompts)

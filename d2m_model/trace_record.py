"""A trace on the host: reads and describes the recording of trace.py.

Shapes: T tokens of one sample, K slots, E experts, A assignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .blocks import FFN
from .config import FluxMoEConfig

_VERSION = 1
NO_EXPERT = 255  # stands where a token has no (further) expert
MAX_TRACED_EXPERTS = 255  # the other values of a byte

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class SampleKey(NamedTuple):
    """Identity of a sample during the whole run."""

    condition: str  # positive, negative, or another name that the guider uses
    entry: int  # index among prompts that are combined
    image: int  # index in the batch of images


@dataclass(slots=True, kw_only=True)
class Entry:
    """Position in a step's buffer of one router's choice for `batch` samples of `tokens` tokens."""

    ffn: str
    number: int  # index of the pass
    batch: int
    of: int  # size of the batch that the block was called with
    tokens: int
    experts: int
    slots: int | None = 0  # experts per token; None: as many as `counts` has for each token, `assigned` in total
    gates: int | None = None  # None: all gates are the largest
    margin: int = 0
    counts: int = 0
    assigned: int = 0
    rows: tuple[int, int] | None = None  # offset and number of the valid samples (int32); None: all
    whole: bool = False  # the choice has all samples of the batch, not only `rows`


class GroupEntry(NamedTuple):
    """Position of a block group's choice: bytes [batch, blocks], 1 where the block runs."""

    number: int  # index of the pass
    group: int
    batch: int
    blocks: int
    at: int


@dataclass(slots=True)
class PassRecord:
    """One call of the transformer: the samples of its batch, and their tokens beside those of the image."""

    samples: list[SampleKey]
    text_tokens: int
    reference_tokens: int


class Layer(NamedTuple):
    """A router's choice for one sample: uint8 [T, K] (best first, then NO_EXPERT), [T, K], [T]."""

    experts_TK: Bytes
    gates_TK: Bytes
    margin_T: Bytes


@dataclass(slots=True, kw_only=True)
class Step:
    """One evaluation of the model."""

    settings: dict[str, Any]
    passes: list[PassRecord]
    entries: list[Entry]
    groups: list[GroupEntry]
    buffer: Bytes = field(default_factory=lambda: np.zeros(4, np.uint8))

    @property
    def sigma(self) -> float:
        return float(self.buffer[:4].copy().view(np.float32)[0])

    def places(self) -> dict[SampleKey, tuple[int, int]]:
        """Return pass and row of every sample: the first ones, if a guidance method runs a sample several times."""
        found: dict[SampleKey, tuple[int, int]] = {}
        for number, it in enumerate(self.passes):
            for row, key in enumerate(it.samples):
                found.setdefault(key, (number, row))
        return found

    def choices(self, number: int, row: int) -> dict[str, Layer]:
        """Return the choices for one row of a pass, by FFN that ran on it."""
        found = {}
        for entry in self.entries:
            if entry.number == number and (at := self._position(entry, row)) is not None:
                found[entry.ffn] = self._layer(entry, at)
        return found

    def blocks(self, number: int, row: int) -> dict[int, list[bool]]:
        """Return which blocks of each group run on one row of a pass."""
        batch = len(self.passes[number].samples)
        found = {}
        for entry in self.groups:
            if entry.number == number and entry.batch == batch:
                first = entry.at + row * entry.blocks
                found[entry.group] = [bool(runs) for runs in self.buffer[first : first + entry.blocks]]
        return found

    def _position(self, entry: Entry, row: int) -> int | None:
        """Return the index of a row of the pass among the entry's samples; None if it is not among them."""
        # If another pack calls a block with a part of the batch, it is not known which part.
        if entry.of != len(self.passes[entry.number].samples):
            return None
        if entry.rows is not None:
            at, count = entry.rows
            rows = self.buffer[at : at + 4 * count].copy().view(np.int32).tolist()
            if row not in rows:
                return None
            return row if entry.whole else int(rows.index(row))
        return row

    def _layer(self, entry: Entry, at: int) -> Layer:
        tokens, first = entry.tokens, at * entry.tokens
        margin_T = self.buffer[entry.margin + first : entry.margin + first + tokens]
        if entry.slots is not None:
            span = slice(first * entry.slots, (first + tokens) * entry.slots)
            experts_TK = self.buffer[entry.experts :][span].reshape(tokens, entry.slots)
            if entry.gates is None:
                return Layer(experts_TK, np.full_like(experts_TK, 255), margin_T)
            return Layer(experts_TK, self.buffer[entry.gates :][span].reshape(tokens, entry.slots), margin_T)
        counts = self.buffer[entry.counts : entry.counts + entry.batch * tokens].astype(np.int64)
        start, counts_T = int(counts[:first].sum()), counts[first : first + tokens]
        span = slice(start, start + int(counts_T.sum()))
        filled = np.arange(int(counts_T.max(initial=0))) < counts_T[:, None]
        experts_TK, gates_TK = np.full(filled.shape, NO_EXPERT, np.uint8), np.zeros(filled.shape, np.uint8)
        experts_TK[filled] = self.buffer[entry.experts :][span]
        gates_TK[filled] = 255 if entry.gates is None else self.buffer[entry.gates :][span]
        return Layer(experts_TK, gates_TK, margin_T)


@dataclass(kw_only=True)
class Trace:
    """One sampling run. Does not change."""

    config: FluxMoEConfig
    grid: tuple[int, int]
    steps: list[Step]
    notes: list[str]
    size: int  # of what was recorded, in bytes
    pieces: dict[SampleKey, list[str]]
    conditions: tuple[str, ...]

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def layers(self) -> list[str]:
        """Routed FFNs in the order in which they run."""

        return sorted(self.config.ffns, key=FFN.parse)

    @cached_property
    def samples(self) -> list[SampleKey]:
        """Samples by condition (in the guider's order, or positive first), then by prompt, then by image."""
        keys = {key for step in self.steps for it in step.passes for key in it.samples}
        order = {condition: number for number, condition in enumerate(self.conditions)}
        return sorted(keys, key=lambda key: (order.get(key.condition, len(order)), key))

    @cached_property
    def text_tokens(self) -> int:
        """Text tokens of the longest prompt. Shorter ones are padded with tokens that no router saw."""
        return max((it.text_tokens for step in self.steps for it in step.passes), default=0)

    @cached_property
    def reference_tokens(self) -> int:
        return max((it.reference_tokens for step in self.steps for it in step.passes), default=0)

    @cached_property
    def slots(self) -> int:
        """K, the largest number of experts of a token, at least 1."""
        most = 1
        for step in self.steps:
            for entry in step.entries:
                if entry.slots is not None:
                    most = max(most, entry.slots)
                else:
                    counts = step.buffer[entry.counts : entry.counts + entry.batch * entry.tokens]
                    most = max(most, int(counts.max(initial=0)))
        return most

    def tokens(self, ffn: str) -> int:
        return {
            "img": self.image_tokens + self.reference_tokens,
            "txt": self.text_tokens,
            "joint": self.text_tokens + self.image_tokens + self.reference_tokens,
        }[FFN.parse(ffn).stream]

    def choices(self, step: int, key: SampleKey) -> dict[str, Layer]:
        """Return the choices for a sample in a step, by FFN that ran on it, without padding tokens."""
        found = self.steps[step]
        place = found.places().get(key)
        if place is None:
            return {}
        of = found.passes[place[0]]
        own = {
            "img": self.image_tokens + of.reference_tokens,
            "txt": of.text_tokens,
            "joint": of.text_tokens + self.image_tokens + of.reference_tokens,
        }
        # Where packs merge tokens, it is not known which token is which.
        return {ffn: it for ffn, it in found.choices(*place).items() if len(it.margin_T) == own[FFN.parse(ffn).stream]}

    def of_image(self, step: int, key: SampleKey, ffn: str) -> Layer | None:
        """Return an FFN's choice for the image's patches, row by row; None if it did not run.

        Raises ValueError for an FFN of the text.
        """
        if FFN.parse(ffn).stream == "txt":
            raise ValueError(f"{ffn} routes no image tokens; expected a single block's or an image stream's FFN.")
        layer = self.choices(step, key).get(ffn)
        if layer is None:
            return None
        place = self.steps[step].places()[key]
        first = self.steps[step].passes[place[0]].text_tokens if FFN.parse(ffn).stream == "joint" else 0
        return Layer(*(part[first : first + self.image_tokens] for part in layer))

    # Form that the expert map reads

    @cached_property
    def described(self) -> dict[str, Any]:
        """Everything except the choices themselves, as JSON."""
        height, width = self.grid
        config = self.config
        return {
            "version": _VERSION,
            "grid": {"height": height, "width": width},
            "text_tokens": self.text_tokens,
            "image_tokens": self.image_tokens,
            "reference_tokens": self.reference_tokens,
            "router": config.router.kind,
            "slots": self.slots,
            "samples": [
                {"index": index, "cond": key.condition, "prompt": key.entry, "image": key.image}
                for index, key in enumerate(self.samples)
            ],
            "layers": [
                {"name": ffn, "stream": FFN.parse(ffn).stream, "experts": config.ffns[ffn].experts}
                for ffn in self.layers
            ],
            "groups": [{"kind": it.kind, "first": it.first, "blocks": it.blocks} for it in config.groups],
            "steps": [self._described_step(number) for number in range(len(self.steps))],
            "prompt": self._prompt(),
            "notes": self.notes,
        }

    def _described_step(self, number: int) -> dict[str, Any]:
        step = self.steps[number]
        places = step.places()
        samples = []
        for key in self.samples:
            choices = self.choices(number, key)
            blocks = step.blocks(*places[key]) if key in places else {}
            samples.append(
                {
                    "evaluated": key in places,
                    "ran": [ffn in choices for ffn in self.layers],
                    "load": [self._load(ffn, choices.get(ffn)) for ffn in self.layers],
                    "blocks": [
                        blocks.get(index, [False] * group.blocks) for index, group in enumerate(self.config.groups)
                    ],
                }
            )
        return {"sigma": step.sigma, "settings": step.settings, "samples": samples}

    def _load(self, ffn: str, layer: Layer | None) -> list[int]:
        experts = self.config.ffns[ffn].experts
        if layer is None:
            return [0] * experts
        counts = np.bincount(layer.experts_TK.reshape(-1), minlength=NO_EXPERT + 1)
        return [int(count) for count in counts[:experts]]

    def _prompt(self) -> list[list[str] | None] | None:
        """Return the pieces of every sample's prompt, one per text token; None where they are not known."""
        if not self.pieces:
            return None
        found: list[list[str] | None] = []
        for key in self.samples:
            pieces = self.pieces.get(key)
            filled = None if pieces is None else [*pieces, *([""] * self.text_tokens)][: self.text_tokens]
            found.append(filled)
        return found

    def step_bytes(self, step: int, sample: int) -> bytes:
        """Return the bytes of every layer that ran, in order: experts [T*K] (best first), gates [T*K], margins [T]."""
        return b"".join(self._parts(step, sample))

    def _parts(self, step: int, sample: int) -> Iterator[bytes]:
        key = self.samples[sample]
        choices = self.choices(step, key)
        place = self.steps[step].places().get(key)
        text = self.steps[step].passes[place[0]].text_tokens if place else 0
        for ffn in self.layers:
            if (layer := choices.get(ffn)) is None:
                continue
            for part, nothing in zip(layer, (NO_EXPERT, 0, 0), strict=True):
                yield self._filled(ffn, part, text, nothing).tobytes()

    def _filled(self, ffn: str, part: Bytes, text: int, nothing: int) -> Bytes:
        """Pad to the trace's slots, text tokens and reference tokens."""
        shape = (self.tokens(ffn), self.slots) if part.ndim == 2 else (self.tokens(ffn),)
        found = np.full(shape, nothing, np.uint8)
        slots = (slice(0, part.shape[1]),) if part.ndim == 2 else ()
        if FFN.parse(ffn).stream != "joint":
            found[(slice(0, len(part)), *slots)] = part
            return found
        found[(slice(0, text), *slots)] = part[:text]
        found[(slice(self.text_tokens, self.text_tokens + len(part) - text), *slots)] = part[text:]
        return found

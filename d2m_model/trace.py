"""Compact recording of the routers' choices in one sampling run.

Each call of the transformer (a pass) has a RoutingRecorder. It keeps the tensors of the choices and computes nothing, so
that the blocks run the same operators with a trace as without. At the end of an evaluation (all of its passes: prompts
and negative prompts) all choices are packed into one buffer of bytes, which is copied to the host once.

trace_record.py reads these buffers. Shapes: B batch, S samples of a block, T tokens of all samples of a call, H hidden size,
E experts, K top_k, A assignments, L layers of one shape, M blocks of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import FFN
from .config import FluxMoEConfig
from .host_copy import HostCopy
from .mob import BlockRouting, SampleSubset
from .routers import Gate, Routing
from .trace_record import Entry, GroupEntry, PassRecord, SampleKey, Step, Trace

# Recording


class Heard(NamedTuple):
    """Choice of one router for the tokens of `batch` samples."""

    ffn: str
    routing: Routing
    normalised: bool  # False: every expert that is chosen has weight 1
    batch: int
    of: int  # size of the batch that the block was called with
    index_S: Tensor | None  # samples of that batch that the choice is for; None: all
    whole: bool  # the choice was made for the other samples too

    def on(self, device: torch.device) -> Heard:
        return self._replace(
            routing=self.routing.on(device),
            index_S=None if self.index_S is None else self.index_S.to(device),
        )


class RoutingRecorder:
    """Records the routers' choices in one pass. Hosts run a traced model without graphs of torch.compile."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.chosen: list[tuple[int, Tensor]] = []

    def experts(self, ffn: str, routing: Routing, batch: int, gate: Gate) -> None:
        """Record the choice of an FFN's router for the tokens of `batch` samples, sample by sample."""
        self.heard.append(_heard(ffn, routing, gate, batch))

    def blocks(self, group: int, routing: BlockRouting) -> None:
        """Record the choice of block group `group` for every sample."""
        self.chosen.append((group, routing.chosen_BM))

    def part(self, samples: SampleSubset, whole: bool) -> RoutingRecorder:
        """Return a recorder for a block that runs for these samples. `whole`: it runs on all samples of the batch."""
        return _Part(self, samples, whole)


class _Part(RoutingRecorder):
    def __init__(self, recorder: RoutingRecorder, samples: SampleSubset, whole: bool) -> None:
        self.recorder, self.samples, self.whole = recorder, samples, whole

    def experts(self, ffn: str, routing: Routing, batch: int, gate: Gate) -> None:
        heard = _heard(ffn, routing, gate, batch)
        heard = heard._replace(of=self.samples.batch, index_S=self.samples.index_S, whole=self.whole)
        self.recorder.heard.append(heard)


def _heard(ffn: str, routing: Routing, gate: Gate, batch: int) -> Heard:
    return Heard(ffn, routing, gate.mode == "normalised", batch, batch, None, False)


# Packing


@dataclass(slots=True)
class _Pieces:
    """Pieces of a buffer, uint8, and their total length."""

    pieces: list[Tensor] = field(default_factory=list)
    length: int = 0

    def add(self, piece: Tensor) -> int:
        """Append a piece and return its offset in the buffer."""
        at = self.length
        self.pieces.append(piece.reshape(-1))
        self.length += piece.numel()
        return at


def _bytes(part: Tensor) -> Tensor:
    """Return 255 times numbers from 0 to 1, as uint8."""
    return (part * 255).round_().to(torch.uint8)


def _margins(logits_LTE: Tensor, best_LTK: Tensor | None) -> Tensor:
    """Return the probability of the best expert less that of the second best, uint8 [L, T].

    `best_LTK` are the experts best first, if that order is known.
    """
    probabilities_LTE = logits_LTE.softmax(dim=-1)
    if best_LTK is None or best_LTK.shape[-1] < 2:
        best_LT2 = probabilities_LTE.topk(min(2, logits_LTE.shape[-1]), dim=-1).values
    else:
        best_LT2 = probabilities_LTE.gather(-1, best_LTK[..., :2])
    return _bytes(best_LT2[..., 0] - best_LT2[..., 1] if best_LT2.shape[-1] == 2 else best_LT2[..., 0])


def pack(recorders: Sequence[RoutingRecorder], sigma: Tensor) -> tuple[Tensor, list[Entry], list[GroupEntry]]:
    """Pack sigma (float32) and all recorded choices into one uint8 buffer on sigma's device.

    Returns the buffer and the positions of the choices of FFNs and of block groups. FFNs of the same shape are packed
    together, by few operators. Passes may have run on several devices.
    """
    pieces = _Pieces()
    pieces.add(sigma.reshape(-1)[:1].float().view(torch.uint8))
    alike: dict[tuple[Any, ...], list[tuple[int, Heard]]] = {}
    groups = []
    for number, recorder in enumerate(recorders):
        for heard in recorder.heard:
            heard = heard.on(sigma.device)
            routing = heard.routing
            key = (routing.per_token, routing.logits_TE.shape, heard.normalised, routing.gate_unit)
            alike.setdefault(key, []).append((number, heard))
        for group, chosen_BM in recorder.chosen:
            at = pieces.add(chosen_BM.to(sigma.device, torch.uint8))
            batch, blocks = chosen_BM.shape
            groups.append(GroupEntry(number, group, batch, blocks, at))
    entries: list[Entry] = []
    for layers in alike.values():
        uneven = layers[0][1].routing.per_token is None
        entries += (_pack_uneven if uneven else _pack_even)(pieces, layers)
    return torch.cat([piece.to(sigma.device) for piece in pieces.pieces]), entries, groups


def _entry(pieces: _Pieces, number: int, heard: Heard, **places: Any) -> Entry:
    rows = None
    if heard.index_S is not None:
        rows = (pieces.add(heard.index_S.to(torch.int32).view(torch.uint8)), heard.index_S.shape[0])
    tokens = heard.routing.logits_TE.shape[0] // heard.batch
    return Entry(
        ffn=heard.ffn, number=number, batch=heard.batch, of=heard.of, tokens=tokens, rows=rows, whole=heard.whole, **places
    )  # fmt: skip


def _pack_even(pieces: _Pieces, layers: Sequence[tuple[int, Heard]]) -> list[Entry]:
    routings = [heard.routing for _, heard in layers]
    experts_LTK = torch.stack([routing.experts_TK for routing in routings])
    logits_LTE = torch.stack([routing.logits_TE for routing in routings])
    margins = pieces.add(_margins(logits_LTE, experts_LTK))
    experts = pieces.add(experts_LTK.to(torch.uint8))
    gates = None
    if layers[0][1].normalised:
        unit = routings[0].gate_unit
        if unit is None:
            shares_LTK = logits_LTE.softmax(dim=-1).gather(-1, experts_LTK)
        else:
            shares_LTK = torch.stack([routing.gates_TK for routing in routings]) / unit
        gates = pieces.add(_bytes(shares_LTK))
    tokens, slots = experts_LTK.shape[1:]
    return [
        _entry(
            pieces, number, heard, slots=slots, experts=experts + i * tokens * slots,
            gates=None if gates is None else gates + i * tokens * slots, margin=margins + i * tokens,
        )
        for i, (number, heard) in enumerate(layers)
    ]  # fmt: skip


def _pack_uneven(pieces: _Pieces, layers: Sequence[tuple[int, Heard]]) -> list[Entry]:
    routings = [heard.routing for _, heard in layers]
    logits_LTE = torch.stack([routing.logits_TE for routing in routings])
    margins = pieces.add(_margins(logits_LTE, None))
    count, tokens, experts = logits_LTE.shape
    lengths = [routing.token_A.shape[0] for routing in routings]
    row_A = torch.cat([routing.token_A + i * tokens for i, routing in enumerate(routings)])
    expert_A = torch.cat([routing.expert_A for routing in routings])
    flat_A = row_A * experts + expert_A
    # Tokens keep their order, a token's experts are sorted best first: by two stable sorts, for which no host waits.
    by_logit_A = logits_LTE.flatten().index_select(0, flat_A).argsort(descending=True, stable=True)
    order_A = by_logit_A.index_select(0, row_A.index_select(0, by_logit_A).argsort(stable=True))
    counts_LT = torch.zeros(count * tokens, dtype=torch.int32, device=logits_LTE.device)
    counts_LT = counts_LT.scatter_add(0, row_A, torch.ones_like(row_A, dtype=torch.int32))
    counts = pieces.add(counts_LT.to(torch.uint8))
    chosen = pieces.add(expert_A.index_select(0, order_A).to(torch.uint8))
    gates = None
    if layers[0][1].normalised:
        unit = routings[0].gate_unit
        if unit is None:
            shares_A = logits_LTE.softmax(dim=-1).flatten().index_select(0, flat_A)
        else:
            shares_A = torch.cat([routing.gate_A for routing in routings]) / unit
        gates = pieces.add(_bytes(shares_A.index_select(0, order_A)))
    entries, first = [], 0
    for i, ((number, heard), length) in enumerate(zip(layers, lengths, strict=True)):
        entries.append(
            _entry(
                pieces, number, heard, slots=None, assigned=length, experts=chosen + first,
                gates=None if gates is None else gates + first, margin=margins + i * tokens, counts=counts + i * tokens,
            )
        )  # fmt: skip
        first += length
    return entries


# A run


@dataclass(slots=True)
class Pass:
    """One call of the transformer: its recorder, and the samples of its batch in order."""

    samples: list[SampleKey]
    text_tokens: int
    reference_tokens: int
    recorder: RoutingRecorder = field(default_factory=RoutingRecorder)


@dataclass(slots=True)
class Evaluation:
    """One evaluation of the model. `sigma` is a tensor that stays on its device until the end."""

    sigma: Tensor
    settings: dict[str, Any] | None = None  # as JSON, of the first pass
    passes: list[Pass] = field(default_factory=list)


@dataclass(slots=True)
class _Flight:
    """A buffer on its way to the host."""

    step: Step
    buffer: HostCopy


class Run:
    """Recording of one sampling run. It never makes a run fail: beyond `limit` bytes it stops, with a note in the trace."""

    def __init__(self, config: FluxMoEConfig, grid: tuple[int, int], limit: int) -> None:
        self.config, self.grid, self.limit = config, grid, limit
        self.steps: list[Step] = []
        self.notes: dict[str, None] = {}  # a set in order
        self.bytes, self.full = 0, False
        self.conditions: tuple[str, ...] = ()  # order of the samples' conditions
        self.pieces: dict[SampleKey, list[str]] = {}  # pieces of the samples' prompts, one per text token
        self._flight: _Flight | None = None

    def note(self, text: str) -> None:
        self.notes[text] = None

    def end(self, evaluation: Evaluation) -> None:
        """Pack and keep the choices of an evaluation's passes."""
        buffer, entries, groups = pack([it.recorder for it in evaluation.passes], evaluation.sigma)
        if self.bytes + buffer.numel() > self.limit:
            self.full = True
            self.note(
                f"Recording stopped at evaluation {len(self.steps)}: a trace is at most {self.limit / 2**20:g} MiB. "
                "Sample fewer images, steps or pixels at a time."
            )
            return
        self.bytes += buffer.numel()
        passes = [self._record(number, it, entries) for number, it in enumerate(evaluation.passes)]
        step = Step(settings=evaluation.settings or {}, passes=passes, entries=entries, groups=groups)
        self._land()
        # The host does not wait here: the copy is finished long before the next evaluation ends.
        self._flight = _Flight(step=step, buffer=HostCopy(buffer))
        self.steps.append(step)

    def _record(self, number: int, it: Pass, entries: Sequence[Entry]) -> PassRecord:
        """Return the record of a pass, with the numbers of tokens that routers saw: other packs may add tokens."""
        image, text, references = self.grid[0] * self.grid[1], it.text_tokens, it.reference_tokens
        seen = {FFN.parse(entry.ffn).stream: entry.tokens for entry in entries if entry.number == number}
        text = seen.get("txt", text)
        if "img" in seen:
            references = seen["img"] - image
        elif "joint" in seen:
            references = seen["joint"] - image - text
        return PassRecord(it.samples, text, max(0, references))

    def _land(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            values = flight.buffer.wait().numpy()
            flight.step.buffer = values.copy() if flight.buffer.landed is not None else values  # out of pinned memory

    def finish(self) -> Trace:
        self._land()
        return Trace(
            config=self.config, grid=self.grid, steps=self.steps, notes=list(self.notes), size=self.bytes,
            pieces=self.pieces, conditions=self.conditions,
        )  # fmt: skip

"""The traces that this server holds: bounded in number and bytes, those used last stay.

A trace belongs to a TRACE (the output of Trace Routing), and is shown under ids of its own by expert maps. It is freed
with the last map that shows it, with the TRACE that nothing shows, or when newer ones need the room. A node whose trace
was freed runs again when it is queued next, though nothing else has changed: its fingerprint counts such losses.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..d2m_model.trace_record import Trace

MOST_TRACES = 16
MOST_BYTES = 512 * 2**20
RUNS_KEPT = 4  # of one TRACE; without latents to tell them by, the last one counts
COMPARED = 1024  # numbers of latents


def sample_of(latents: Tensor) -> Tensor:
    """Some of the numbers of latents, by which they are known again."""
    flat = latents.flatten()
    return flat[:: max(1, flat.numel() // COMPARED)].float().cpu()


@dataclass(slots=True)
class _Held:
    trace: Trace
    latents: Tensor
    owner: weakref.ref[TraceHandle]
    ids: dict[str, str] = field(default_factory=dict)  # id -> the node that shows it


class TraceHandle:
    """A TRACE: there before anything is sampled. `node` is the execution id of its Trace Routing."""

    def __init__(self, store: TraceStore, node: str) -> None:
        self.store, self.node = store, node
        self.runs: list[str] = []  # keys, the last run last
        weakref.finalize(self, store.drop_unshown, self.runs).atexit = False

    def keep(self, trace: Trace, latents: Tensor) -> None:
        """One more run of the traced MODEL."""
        self.runs.append(self.store.hold(trace, sample_of(latents), self))
        self.store.drop_unshown(self.runs[:-RUNS_KEPT])
        del self.runs[:-RUNS_KEPT]

    def key(self, latents: Tensor | None) -> str:
        """Of the run that these latents came out of; None: of the last. Raises ValueError if there is none."""
        if not self.runs:
            raise ValueError(
                "This trace is empty: nothing was sampled with its MODEL. Put the MODEL output of Trace Routing on the "
                "sampler (a second Trace Routing behind it would take its place), and on the Expert Map the image or the "
                "latent that this sampler made."
            )
        if latents is None:
            return self.runs[-1]
        wanted = sample_of(latents)
        for key in reversed(self.runs):
            found = self.store.latents(key)
            # Samplers' outputs may be stored in half precision.
            if found is not None and found.shape == wanted.shape and torch.allclose(found, wanted, 0.02, 0.02):
                return key
        raise ValueError(
            "The latent on the Expert Map was not sampled with the MODEL that its trace is of, or that trace has been "
            "freed. Connect the sampler's own latent, as it comes out of the sampler; queue again with another seed if it does."
        )


class TraceStore:
    """Asked by the executing thread and by the server's."""

    def __init__(self, most_traces: int = MOST_TRACES, most_bytes: int = MOST_BYTES) -> None:
        self.most_traces, self.most_bytes = most_traces, most_bytes
        self._held: OrderedDict[str, _Held] = OrderedDict()  # by key, the one used last at the end
        self._keys: dict[str, str] = {}  # by id
        self._shown: dict[str, set[str]] = {}  # what a map shows now: ids by node
        self._lost: Counter[str] = Counter()
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        return sum(held.trace.size for held in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    # Traces

    def hold(self, trace: Trace, latents: Tensor, owner: TraceHandle) -> str:
        """Returns its key. Makes room: the newest trace stays, whatever its size."""
        with self._lock:
            key = secrets.token_urlsafe(16)
            self._held[key] = _Held(trace, latents, weakref.ref(owner))
            while len(self._held) > 1 and (len(self._held) > self.most_traces or self.bytes > self.most_bytes):
                self._drop(next(iter(self._held)))
            return key

    def latents(self, key: str) -> Tensor | None:
        with self._lock:
            held = self._held.get(key)
            return None if held is None else held.latents

    def drop_unshown(self, keys: list[str]) -> None:
        with self._lock:
            for key in keys:
                if key in self._held and not self._held[key].ids:
                    self._drop(key)

    def _drop(self, key: str) -> None:
        held = self._held.pop(key)
        for shown in list(held.ids):
            self._forget(shown, held)
        owner = held.owner()
        if owner is not None and owner.runs[-1:] == [key]:
            self._lost[owner.node] += 1

    # What is shown

    def show(self, keys: list[str], node: str) -> list[tuple[str, Trace]]:
        """Ids under which `node` shows these traces from now on, and the traces. The same trace keeps its id there.
        Raises ValueError if one has been freed."""
        with self._lock:
            found = []
            for key in keys:
                if (held := self._held.get(key)) is None:
                    raise ValueError(
                        "The trace of this image has been freed to make room for others. Queue again: Trace Routing then "
                        "records it anew."
                    )
                self._held.move_to_end(key)
                shown = next((it for it, by in held.ids.items() if by == node), None) or secrets.token_urlsafe(16)
                held.ids[shown] = node
                self._keys[shown] = key
                found.append((shown, held.trace))
            self._shown[node] = {shown for shown, _ in found}
            return found

    def get(self, shown: str) -> Trace | None:
        """By the id under which it is shown."""
        with self._lock:
            key = self._keys.get(shown)
            if key is None:
                return None
            self._held.move_to_end(key)
            return self._held[key].trace

    def free(self, shown: str) -> bool:
        """It is no longer shown under this id. False if it was not."""
        with self._lock:
            key = self._keys.get(shown)
            if key is None:
                return False
            held = self._held[key]
            self._forget(shown, held)
            if not held.ids:
                self._drop(key)
            return True

    def _forget(self, shown: str, held: _Held) -> None:
        node = held.ids.pop(shown)
        self._keys.pop(shown, None)
        if shown in self._shown.get(node, ()):
            self._shown.pop(node)
            self._lost[node] += 1

    def losses(self, node: str | None) -> int:
        """How often what a node had last has been freed: part of its fingerprint."""
        with self._lock:
            return self._lost[node or ""]


STORE = TraceStore()

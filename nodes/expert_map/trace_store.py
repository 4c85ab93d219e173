"""The traces that this server keeps, bounded in number and bytes; the least recently used goes first.

A trace belongs to a TRACE (the output of Trace Routing), and expert maps show it under ids of their own. It is freed
with the last map that shows it, with its TRACE if no map shows it, or when newer traces need the room. A trace that
another run of its TRACE has replaced on the map stays with the TRACE, since ComfyUI's cache may return older images.
A node whose trace was freed runs again when it is queued next, even if nothing else has changed: its fingerprint
counts its freed traces.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...d2m_model.trace_record import Trace

_MAX_TRACES = 16
_MAX_BYTES = 512 * 2**20
_RUNS_KEPT = 4  # of one TRACE
_IMAGES_KNOWN = 64  # of one TRACE
_EXCERPT = 1024  # numbers that latents and images are recognised by
_TOLERANCE = 0.02  # samplers' outputs may be stored in half precision

_FREED = (
    "The trace of this image has been freed to make room for others. Queue again: Trace Routing then records it anew."
)


def _excerpt(tensor: Tensor) -> Tensor:
    """Return some of the numbers of latents or images, by which they are recognised."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // _EXCERPT)].float().cpu()


def _nearly_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, _TOLERANCE, _TOLERANCE)


def _executing_prompt() -> str | None:
    """Return the id of the prompt that is executing."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


@dataclass(slots=True)
class _StoredTrace:
    trace: Trace
    latents: Tensor  # excerpt of the run's
    owner: weakref.ref[TraceHandle]
    ids: dict[str, str] = field(default_factory=dict)  # id -> node that shows the trace under it
    replaced: bool = False  # by another trace, on a map


class TraceHandle:
    """A TRACE, which exists before anything is sampled. `node` is the execution id of its Trace Routing."""

    def __init__(self, store: TraceStore, node: str) -> None:
        self.store, self.node = store, node
        self.runs: list[str] = []  # keys in the store, the last run last
        self.runs_made = 0  # including those that are no longer kept
        self.last_prompt: str | None = None  # prompt of the last run
        self.images: deque[tuple[Tensor, str]] = deque(maxlen=_IMAGES_KNOWN)  # excerpts of images, and their runs
        weakref.finalize(self, store.drop_unshown, self.runs).atexit = False

    def add_run(self, trace: Trace, latents: Tensor) -> None:
        """Add a run of the traced MODEL, with the latents that it made."""
        self.store.add(trace, _excerpt(latents), self)
        self.runs_made, self.last_prompt = self.runs_made + 1, _executing_prompt()
        self.store.drop_unshown(self.runs[:-_RUNS_KEPT])
        del self.runs[:-_RUNS_KEPT]

    def find_run(self, latents: Tensor | None, image: Tensor | None = None) -> str:
        """Return the key of the run that made these latents or this image.

        Raises ValueError if there is no such run, or several possible ones. If the run has been freed, it is recorded
        anew when the prompt is queued next.
        """
        if not self.runs:
            raise ValueError(
                "This trace is empty: nothing was sampled with its MODEL. Put the MODEL output of Trace Routing on the "
                "sampler (a second Trace Routing behind it would take its place), and on the Expert Map the image or the "
                "latent that this sampler made."
            )
        excerpt = None if image is None else _excerpt(image)
        key = self._run_of_image(excerpt) if latents is None else self._run_of_latents(_excerpt(latents))
        if key is None or self.store.latents(key) is None:
            self.store.count_freed(self.node)
            raise ValueError(_FREED)
        if excerpt is not None:
            self.images.append((excerpt, key))
        return key

    def _run_of_latents(self, wanted: Tensor) -> str | None:
        """Return the run that made these latents; None if it may have been freed. Raises ValueError if there is none."""
        kept = {key: latents for key in reversed(self.runs) if (latents := self.store.latents(key)) is not None}
        for key, latents in kept.items():
            if _nearly_equal(latents, wanted):
                return key
        if len(kept) < self.runs_made:
            return None
        raise ValueError(
            "The latent on the Expert Map was not sampled with the MODEL of its trace. Connect the sampler's own "
            "latent, as it comes out of the sampler."
        )

    def _run_of_image(self, wanted: Tensor | None) -> str:
        """Return the last run if it was just made. Otherwise the image may come from ComfyUI's cache: recognise it."""
        if self.runs_made == 1 or self.last_prompt == _executing_prompt():
            return self.runs[-1]
        for excerpt, key in reversed(self.images):
            if wanted is not None and _nearly_equal(excerpt, wanted):
                return key
        self.store.count_freed(self.node)
        raise ValueError(
            "Several images were sampled with the MODEL of this trace, and the Expert Map has not shown this one before. "
            "Connect the sampler's latent too, which tells which run it is; or queue again: the image is then sampled "
            "anew."
        )


class TraceStore:
    """Traces by key and by the ids under which maps show them. Used by the executor's thread and the server's."""

    def __init__(self, max_traces: int = _MAX_TRACES, max_bytes: int = _MAX_BYTES) -> None:
        self.max_traces, self.max_bytes = max_traces, max_bytes
        self._stored: OrderedDict[str, _StoredTrace] = OrderedDict()  # by key, the most recently used last
        self._keys: dict[str, str] = {}  # by id
        self._shown: dict[str, set[str]] = {}  # ids that a map shows now, by node
        self._freed: Counter[str] = Counter()  # by node
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        # A list, because the garbage collector may drop the traces of an unused TRACE meanwhile, in this very thread.
        return sum(stored.trace.size for stored in list(self._stored.values()))

    def __len__(self) -> int:
        return len(self._stored)

    # Traces

    def add(self, trace: Trace, latents: Tensor, owner: TraceHandle) -> None:
        """Add the last run of `owner`, and drop others if there is no room. The newest stays, whatever its size."""
        with self._lock:
            key = secrets.token_urlsafe(16)
            self._stored[key] = _StoredTrace(trace, latents, weakref.ref(owner))
            owner.runs.append(key)
            while len(self._stored) > 1 and (len(self._stored) > self.max_traces or self.bytes > self.max_bytes):
                oldest, *_ = list(self._stored)
                self._drop(oldest)

    def latents(self, key: str) -> Tensor | None:
        """Return the excerpt of the latents of a run; None if its trace has been freed."""
        with self._lock:
            stored = self._stored.get(key)
            return None if stored is None else stored.latents

    def drop_unshown(self, keys: list[str]) -> None:
        """Free those of these traces that no map shows."""
        with self._lock:
            for key in keys:
                if (stored := self._stored.get(key)) is not None and not stored.ids:
                    self._drop(key)

    def _drop(self, key: str) -> None:
        if (stored := self._stored.pop(key, None)) is None:
            return
        for trace_id in list(stored.ids):
            self._remove_id(trace_id, stored)
        owner = stored.owner()
        if owner is not None and owner.runs[-1:] == [key]:
            self._freed[owner.node] += 1

    # Traces on maps

    def show(self, keys: list[str], node: str) -> list[tuple[str, Trace]]:
        """Return the ids under which `node` shows these traces from now on, and the traces.

        A trace keeps the id that it has at this node. Raises ValueError if a trace has been freed.
        """
        with self._lock:
            shown = []
            for key in keys:
                if (stored := self._stored.get(key)) is None:
                    raise ValueError(_FREED)
                self._stored.move_to_end(key)
                own_ids = (trace_id for trace_id, shown_by in stored.ids.items() if shown_by == node)
                trace_id = next(own_ids, None) or secrets.token_urlsafe(16)
                stored.ids[trace_id] = node
                self._keys[trace_id] = key
                shown.append((trace_id, stored.trace))
            self._shown[node] = {trace_id for trace_id, _ in shown}
            return shown

    def get(self, trace_id: str) -> Trace | None:
        """Return the trace that a map shows under this id."""
        with self._lock:
            key = self._keys.get(trace_id)
            if key is None:
                return None
            self._stored.move_to_end(key)
            return self._stored[key].trace

    def free(self, trace_id: str) -> None:
        """Stop showing a trace under this id, and drop it unless something else needs it."""
        with self._lock:
            key = self._keys.get(trace_id)
            if key is None:
                return
            stored = self._stored[key]
            stored.replaced = trace_id not in self._shown.get(stored.ids[trace_id], ())
            self._remove_id(trace_id, stored)
            owner = stored.owner()
            runs = [] if owner is None else list(owner.runs)
            if not (stored.replaced and key in runs):
                replaced = [run for run in runs if run in self._stored and self._stored[run].replaced]
                self.drop_unshown([key, *replaced])
            if owner is not None and key not in self._stored and runs[-1:] != [key]:
                # An older run: its image may come from ComfyUI's cache, and has to be sampled anew.
                self._freed[owner.node] += 1

    def _remove_id(self, trace_id: str, stored: _StoredTrace) -> None:
        node = stored.ids.pop(trace_id)
        self._keys.pop(trace_id, None)
        if trace_id in self._shown.get(node, ()):
            self._shown.pop(node)
        # Even if the trace was replaced: ComfyUI's cache may still have the node's output of that time.
        self._freed[node] += 1

    def count_freed(self, node: str) -> None:
        """Count a trace that this node needs and that has been freed."""
        with self._lock:
            self._freed[node] += 1

    def freed_count(self, node: str | None) -> int:
        """Return how many traces of a node have been freed."""
        with self._lock:
            return self._freed[node or ""]

    def fingerprint(self, node: str | None) -> str:
        """Return what has a node run again: the number of its freed traces.

        The id goes with it, since ComfyUI's cache would hand a node the result of an equal one, whose traces are counted
        apart.
        """
        return f"{node} {self.freed_count(node)}"


STORE = TraceStore()

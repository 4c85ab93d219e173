"""The traces that this server holds: bounded in number and bytes, those used last stay.

A trace belongs to a TRACE (the output of Trace Routing), and is shown under ids of its own by expert maps. It is freed
with the last map that shows it, with the TRACE that nothing shows, or when newer ones need the room; one that another
run of its TRACE has replaced on the map stays with the TRACE, for caches of ComfyUI that give older images back. A node
whose trace was freed runs again when it is queued next, though nothing else has changed: its fingerprint counts such
losses.
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

MOST_TRACES = 16
MOST_BYTES = 512 * 2**20
RUNS_KEPT = 4  # of one TRACE
IMAGES_KNOWN = 64  # of one TRACE
COMPARED = 1024  # numbers of latents, and of images
ALIKE = 0.02  # samplers' outputs may be stored in half precision


FREED = (
    "The trace of this image has been freed to make room for others. Queue again: Trace Routing then records it anew."
)


def sample_of(tensor: Tensor) -> Tensor:
    """Some of the numbers of latents or images, by which they are known again."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // COMPARED)].float().cpu()


def alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, ALIKE, ALIKE)


def prompt_now() -> str | None:
    """The prompt that is executing."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


@dataclass(slots=True)
class _Held:
    trace: Trace
    latents: Tensor
    owner: weakref.ref[TraceHandle]
    ids: dict[str, str] = field(default_factory=dict)  # id -> the node that shows it
    replaced: bool = False  # on a map, by another


class TraceHandle:
    """A TRACE: there before anything is sampled. `node` is the execution id of its Trace Routing."""

    def __init__(self, store: TraceStore, node: str) -> None:
        self.store, self.node = store, node
        self.runs: list[str] = []  # keys, the last run last
        self.made = 0  # runs, those that are no longer kept too
        self.prompt: str | None = None  # that the last run was made in
        self.images: deque[tuple[Tensor, str]] = deque(maxlen=IMAGES_KNOWN)  # samples of images, and their runs
        weakref.finalize(self, store.drop_unshown, self.runs).atexit = False

    def keep(self, trace: Trace, latents: Tensor) -> None:
        """One more run of the traced MODEL."""
        self.store.hold(trace, sample_of(latents), self)
        self.made, self.prompt = self.made + 1, prompt_now()
        self.store.drop_unshown(self.runs[:-RUNS_KEPT])
        del self.runs[:-RUNS_KEPT]

    def key(self, latents: Tensor | None, image: Tensor | None = None) -> str:
        """Of the run that these came out of. Raises ValueError if there is none, or no telling which; where that is
        because a run is gone, it is recorded anew when it is queued next."""
        if not self.runs:
            raise ValueError(
                "This trace is empty: nothing was sampled with its MODEL. Put the MODEL output of Trace Routing on the "
                "sampler (a second Trace Routing behind it would take its place), and on the Expert Map the image or the "
                "latent that this sampler made."
            )
        sample = None if image is None else sample_of(image)
        key = self._key_of_image(sample) if latents is None else self._key_of_latents(sample_of(latents))
        if key is None or self.store.latents(key) is None:
            self.store.lose(self.node)
            raise ValueError(FREED)
        if sample is not None:
            self.images.append((sample, key))
        return key

    def _key_of_latents(self, wanted: Tensor) -> str | None:
        """None: it may be of a run that is gone."""
        held = {key: found for key in reversed(self.runs) if (found := self.store.latents(key)) is not None}
        for key, found in held.items():
            if alike(found, wanted):
                return key
        if len(held) < self.made:
            return None
        raise ValueError(
            "The latent on the Expert Map was not sampled with the MODEL that its trace is of. Connect the sampler's own "
            "latent, as it comes out of the sampler."
        )

    def _key_of_image(self, wanted: Tensor | None) -> str:
        """Of a run that was just made, the last. ComfyUI may also have taken the image from its cache."""
        if self.made == 1 or self.prompt == prompt_now():
            return self.runs[-1]
        for known, key in reversed(self.images):
            if wanted is not None and alike(known, wanted):
                return key
        self.store.lose(self.node)
        raise ValueError(
            "Several images were sampled with the MODEL that this trace is of, and the one on the Expert Map is none that "
            "it has shown. Connect the sampler's latent too, which tells which run it is; or queue again: the image is then "
            "sampled anew."
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
        # A list: a TRACE that the garbage collector finds meanwhile, in this very thread, drops its traces.
        return sum(held.trace.size for held in list(self._held.values()))

    def __len__(self) -> int:
        return len(self._held)

    # Traces

    def hold(self, trace: Trace, latents: Tensor, owner: TraceHandle) -> None:
        """As the owner's last run. Makes room: the newest trace stays, whatever its size."""
        with self._lock:
            key = secrets.token_urlsafe(16)
            self._held[key] = _Held(trace, latents, weakref.ref(owner))
            owner.runs.append(key)
            while len(self._held) > 1 and (len(self._held) > self.most_traces or self.bytes > self.most_bytes):
                oldest, *_ = list(self._held)
                self._drop(oldest)

    def latents(self, key: str) -> Tensor | None:
        with self._lock:
            held = self._held.get(key)
            return None if held is None else held.latents

    def drop_unshown(self, keys: list[str]) -> None:
        with self._lock:
            for key in keys:
                if (held := self._held.get(key)) is not None and not held.ids:
                    self._drop(key)

    def _drop(self, key: str) -> None:
        if (held := self._held.pop(key, None)) is None:
            return
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
                    raise ValueError(FREED)
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
            held.replaced = shown not in self._shown.get(held.ids[shown], ())
            self._forget(shown, held)
            owner = held.owner()
            runs = [] if owner is None else list(owner.runs)
            if not (held.replaced and key in runs):
                others = [it for it in runs if it in self._held and self._held[it].replaced]
                self.drop_unshown([key, *others])
            return True

    def _forget(self, shown: str, held: _Held) -> None:
        node = held.ids.pop(shown)
        self._keys.pop(shown, None)
        if shown in self._shown.get(node, ()):
            self._shown.pop(node)
        # Of a replaced one too: ComfyUI's cache may still have what the node said then.
        self._lost[node] += 1

    def lose(self, node: str) -> None:
        """What this node had is not there any more."""
        with self._lock:
            self._lost[node] += 1

    def losses(self, node: str | None) -> int:
        """How often what a node had has been freed: part of its fingerprint."""
        with self._lock:
            return self._lost[node or ""]


STORE = TraceStore()

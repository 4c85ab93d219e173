"""The teacher's features of a run's samples on disk: inputs and outputs of its blocks.

An entry is a microbatch at one depth, written atomically with a checksum. A missing or damaged entry is computed again
from the nearest sound entry before it, at worst from the data, so a run that was killed resumes with what it has. Only one
block of the teacher has its weights at a time, and only one entry is in memory.

Depth d is the output of the teacher's first d blocks; depth 0 is the output of its embedders.

Shapes: B batch, T image and L text tokens, H hidden size.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2m_model.blocks import blocks_of

from ..data.batch import DataSource
from ..data.copying import copy_to_device
from ..data.store import DamagedEntry, Store
from ..flow.held_out import held_out_seed
from ..flow.noise import noisy_batch
from ..run_config import RunConfig
from ..teacher.frozen import weights_on_device

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_CONDITIONS = "conditions"


@dataclass(kw_only=True, slots=True, frozen=True)
class Features:
    """Both streams at one depth, in the teacher's dtype."""

    image_BTH: Tensor
    text_BLH: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Return the features changed."""
        return Features(image_BTH=change(self.image_BTH), text_BLH=change(self.text_BLH))


@dataclass(kw_only=True, slots=True, frozen=True)
class Conditions:
    """Inputs of a block beside the streams: the teacher's vec [B, H] and rotary embedding; and which text tokens are words."""

    temb_BH: Tensor
    rotary: tuple[Tensor, Tensor]
    image_ids_T3: Tensor
    words_BL: Tensor


class FeatureStore:
    """Entries 0 … `batches` - 1 for training, and `held_out` more with other noise and another order of the data.

    `teacher` is open_frozen_teacher's with `offload: stream`. `report` is told which entries are computed again.
    `check_stop` is called between two entries and may raise. Raises UserError for a full disk; complete entries stay.
    """

    def __init__(
        self,
        folder: Path,
        teacher: FluxTransformer2DModel,
        data: DataSource,
        run: RunConfig,
        *,
        report: Callable[[str], object],
        check_stop: Callable[[], object] = lambda: None,
    ) -> None:
        self.teacher, self.data, self.run, self.report, self.check_stop = teacher, data, run, report, check_stop
        self.blocks: list[nn.Module] = [*blocks_of(teacher).values()]
        self.batches, self.held_out = entry_counts(run)
        self._store = Store(folder)
        parameter = next(teacher.x_embedder.parameters())
        self._device = parameter.device
        self._place = {"device": parameter.device, "dtype": parameter.dtype}
        self._depths: list[set[int]] = [self._entries_in(self._kind(depth)) for depth in range(len(self.blocks) + 1)]
        self._sound: set[tuple[str, int]] = set()  # written or checked by this process

    def provide(self, start: int, end: int) -> None:
        """Compute all entries of depths `start` and `end`, deleting other depths on the way."""
        for depth in range(start + 1):
            self._make(depth, until=start, keep=None)
        for depth in range(start + 1, end + 1):
            self._make(depth, until=end, keep=start)

    def features(self, depth: int, index: int) -> Features:
        """Return one entry, mapped from its file; computed again if it is missing or damaged."""
        stored = self._read(self._kind(depth), index)
        if stored is None:
            features = self._recomputed(depth, index)
            self._write(depth, index, features)
            return features
        return Features(image_BTH=stored["image"], text_BLH=stored["text"])

    def conditions(self, index: int) -> Conditions:
        stored = self._read(_CONDITIONS, index)
        if stored is None:
            self._embedded(index)
            return self.conditions(index)
        ids = torch.cat([stored["text_ids"], stored["image_ids"]])
        return Conditions(
            temb_BH=stored["temb"],
            rotary=self.teacher.pos_embed(copy_to_device(ids, self._device)),
            image_ids_T3=stored["image_ids"],
            words_BL=stored["words"].bool(),
        )

    def remove(self) -> None:
        """Delete all entries."""
        shutil.rmtree(self._store.folder, ignore_errors=True)

    # Computing

    def _make(self, depth: int, *, until: int, keep: int | None) -> None:
        """Compute the entries of a depth from the depth before, except those that exist at a depth up to `until`."""
        existing = set.union(*self._depths[depth : until + 1])
        missing = [index for index in range(self.batches + self.held_out) if index not in existing]
        with weights_on_device(self.blocks[depth - 1]) if missing and depth else nullcontext():
            for index in missing:
                self.check_stop()
                features = self._next(depth, self.features(depth - 1, index), index) if depth else self._embedded(index)
                self._write(depth, index, features)
                if depth and depth - 1 != keep:
                    self._forget(depth - 1, index)
        if depth and depth - 1 != keep:
            shutil.rmtree(self._store.folder / self._kind(depth - 1), ignore_errors=True)
            self._depths[depth - 1].clear()

    def _recomputed(self, depth: int, index: int) -> Features:
        """Compute a single entry, without writing the depths between."""
        nearest = depth
        features = None
        while features is None and nearest:
            nearest -= 1
            stored = self._read(self._kind(nearest), index) if index in self._depths[nearest] else None
            features = None if stored is None else Features(image_BTH=stored["image"], text_BLH=stored["text"])
        features = self._embedded(index) if features is None else features
        for further in range(nearest + 1, depth + 1):
            features = self._next(further, features, index)
        return features

    @torch.no_grad()
    def _next(self, depth: int, before: Features, index: int) -> Features:
        """Run the teacher's block number `depth`, counted from 1, on the features before it."""
        conditions = self.conditions(index)
        text_BLH, image_BTH = self.blocks[depth - 1](
            hidden_states=before.image_BTH.to(**self._place),
            encoder_hidden_states=before.text_BLH.to(**self._place),
            temb=conditions.temb_BH.to(**self._place),
            image_rotary_emb=conditions.rotary,
        )
        return Features(image_BTH=image_BTH, text_BLH=text_BLH)

    @torch.no_grad()
    def _embedded(self, index: int) -> Features:
        """Compute depth 0, as FluxTransformer2DModel.forward does, and write the conditions."""
        run, model, place = self.run, self.teacher, self._place
        # Held-out batches are validation's.
        held_out = index >= self.batches
        number, seed = (index - self.batches, held_out_seed(run.seed)) if held_out else (index, run.seed)
        batch = self.data.batch(number, run.training.batch_size, seed, held_out=held_out)
        noisy = noisy_batch(batch, run.timesteps, seed, number, model)
        guidance = (batch.guidance_B.to(**place) * 1000,) if model.config.guidance_embeds else ()
        temb_BH = model.time_text_embed(noisy.t_B.to(**place) * 1000, *guidance, batch.pooled_BV.to(**place))
        conditions = {
            "temb": temb_BH,
            "image_ids": batch.image_ids_T3,
            "text_ids": batch.text_ids_L3,
            "words": batch.words_BL.to(torch.uint8),
        }
        self._store.put(_CONDITIONS, _key(index), conditions)
        self._sound.add((_CONDITIONS, index))
        return Features(
            image_BTH=model.x_embedder(noisy.tokens_BTC.to(**place)),
            text_BLH=model.context_embedder(batch.context_BLD.to(**place)),
        )

    # Files

    def _kind(self, depth: int) -> str:
        return f"depth-{depth:02}"

    def _entries_in(self, kind: str) -> set[int]:
        return {int(file.stem) for file in (self._store.folder / kind).glob("*/*.safetensors")}

    def _read(self, kind: str, index: int) -> dict[str, Tensor] | None:
        """Read an entry; None if it is missing or damaged."""
        known = (kind, index) in self._sound
        try:
            tensors = self._store.get(kind, _key(index), check=not known)
        except DamagedEntry as damaged:
            self.report(f"{damaged}; it is made again.")
            return None
        if tensors is not None:
            self._sound.add((kind, index))
        return tensors

    def _write(self, depth: int, index: int, features: Features) -> None:
        kind = self._kind(depth)
        self._store.put(kind, _key(index), {"image": features.image_BTH, "text": features.text_BLH})
        self._depths[depth].add(index)
        self._sound.add((kind, index))

    def _forget(self, depth: int, index: int) -> None:
        kind = self._kind(depth)
        self._store.file(kind, _key(index)).unlink(missing_ok=True)
        self._depths[depth].discard(index)
        self._sound.discard((kind, index))


def _key(index: int) -> str:
    return f"{index:06}"


def entry_counts(run: RunConfig) -> tuple[int, int]:
    """Numbers of microbatches: (to train on, held out)."""
    return math.ceil(run.training.blockwise_samples / run.training.batch_size), run.eyes.validation_batches


def disk_bytes(run: RunConfig, hidden_size: int, tokens: int) -> int:
    """Maximum bytes of the features: two depths and one more entry, of samples of `tokens` tokens."""
    entry = run.training.batch_size * tokens * hidden_size * getattr(torch, run.teacher.dtype).itemsize
    return (2 * sum(entry_counts(run)) + 1) * entry

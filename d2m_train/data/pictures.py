"""Source of images with captions: usable samples are sorted into buckets, encoded once, and batched by number."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial

import torch
from PIL import Image
from torch import Tensor

from .. import UserError
from .batch import GUIDANCE, Batch, Progress, Texts, draw_guidance, latent_batch
from .buckets import Size, choose_bucket, fit_to_size, pixels
from .encoded import Encoded
from .held_out import choose_held_out, split_text
from .order import BucketOrder
from .picture_file import UnreadablePicture, read_picture
from .samples import (
    BROKEN_IMAGE,
    TOO_SMALL,
    UNREADABLE,
    LeftOut,
    Samples,
    UnusableSample,
    describe_left_out,
    merge_left_out,
)
from .store import content_key

log = logging.getLogger(__name__)

Buckets = list[tuple[Size, list[int]]]  # image sizes, and the places of their samples

_INDEX_VERSION = 2  # of the index
_NAMED = 5  # changed samples in a message
PART = 64  # samples that are inspected together and share an entry of the index


@dataclass(kw_only=True, slots=True, frozen=True)
class SampleRecord:
    """Result of inspecting a sample: its content, or why it is left out."""

    problem: str | None = None
    reason: str = ""  # of the problem, in Pillow's words
    image: str = ""  # hash of the file
    width: int = 0  # pixels, upright
    height: int = 0
    caption: str = ""


class PictureSource:
    """Images with captions. Each sample is inspected and encoded once; an index in the store keeps the records.

    `prepare` does that for a rank's share; what is still missing is made when a batch needs it. Batches depend only on
    the listing, the settings, size and seed.
    """

    def __init__(
        self,
        name: str,
        samples: Samples,
        encoded: Encoded,
        *,
        resolutions: Sequence[int],
        enlarge: float,
        guidance: tuple[float, float] = GUIDANCE,
        held_out: float = 0.0,
    ) -> None:
        """`held_out`: share of the images that are held out. Raises UserError if there are no samples."""
        self.name, self.samples, self.encoded = name, samples, encoded
        self.resolutions, self.enlarge, self.guidance = tuple(resolutions), enlarge, guidance
        if len(samples) == 0:
            raise self._nothing_usable(samples.left_out)
        self.share = held_out
        self.left_out: LeftOut = {}  # names by reason; complete after the first batch
        self.listing = content_key(_INDEX_VERSION, samples.identity)
        self._index = f"index/{self.listing}"
        self._rank: int | None = None  # None: not prepared yet
        self._buckets: dict[bool, Buckets] | None = None  # of samples that are held out, and of the others
        self._order = lru_cache(maxsize=4)(self._new_order)
        self._part = lru_cache(maxsize=256)(self._read_part)

    @cached_property
    def identity(self) -> str:
        """Identity of the samples' contents, in their order. Samples that have not been inspected are inspected now."""
        digest = hashlib.sha256()
        for place in range(len(self.samples)):
            record = self._record(place)
            if self._size(record) is not None:
                digest.update(f"{record.image} {record.caption!r}\n".encode())
        return content_key(digest.hexdigest(), self.resolutions, self.enlarge, self.encoded.identity, self.share)

    def changes_since(self, listing: str) -> str:
        """Describe how the samples differ from those of an earlier listing of these data, as far as the store knows it."""
        store, before = self.encoded.store, 0
        known: set[tuple[str, str]] = set()
        for number in itertools.count():
            part = store.read_json(f"index/{listing}/{number:06}")
            if not isinstance(part, list):
                break
            before += len(part)
            known.update((fields["image"], fields["caption"]) for fields in part)
        changed = []
        for place in range(len(self.samples)):
            record = self._record(place)
            if (record.image, record.caption) not in known:
                changed.append(self.samples.name(place))
        names = ", ".join(changed[:_NAMED]) + (", …" if len(changed) > _NAMED else "")
        return f"There were {before:,} samples and are {len(self.samples):,}; new or changed: {names or 'none'}."

    # Preparing

    def prepare(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
        """Inspect and encode the missing part of this rank's share, without waiting for other ranks."""
        places = range(len(self.samples))
        parts = [places[start : start + PART] for start in range(0, len(places), PART)]
        done, total = 0, sum(map(len, parts[rank::world]))
        try:
            with ThreadPoolExecutor() as pool:
                for number in range(rank, len(parts), world):
                    for _ in self._prepare_part(number, parts[number], pool):
                        done += 1
                        if progress is not None:
                            progress(done, total)
        finally:
            self.encoded.release()
        self._rank = rank

    def _prepare_part(self, number: int, places: range, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Inspect and encode some samples; yield after each."""
        looked: list[tuple[SampleRecord, Image.Image | None]]
        records = self._stored_part(number, len(places))
        if records is not None:
            looked = [(record, None) for record in records]
        else:
            looked = list(pool.map(self._look, places))  # decoded images are kept for encoding
            self._store_part(number, [record for record, _ in looked])
        for place, (record, image) in zip(places, looked, strict=True):
            if (size := self._size(record)) is not None:
                if not self.encoded.has_latents(record.image, size):
                    give = partial(self._pixels, place, record, size) if image is None else partial(pixels, image)
                    self.encoded.latents(record.image, size, self.samples.name(place), give)
                if not self.encoded.has_text(record.caption):
                    self.encoded.texts([record.caption])
            yield

    def _look(self, place: int) -> tuple[SampleRecord, Image.Image | None]:
        """Inspect a sample: return its record, and the image at its bucket's size."""
        try:
            data, caption = self.samples.read(place)
        except UnusableSample as problem:
            return SampleRecord(problem=str(problem)), None
        except OSError:
            return SampleRecord(problem=UNREADABLE), None
        try:
            image = read_picture(data)
        except UnreadablePicture as reason:
            return SampleRecord(problem=BROKEN_IMAGE, reason=str(reason)), None
        record = SampleRecord(image=_hash(data), width=image.width, height=image.height, caption=caption)
        size = self._size(record)
        return record, None if size is None else fit_to_size(image, size)

    def _pixels(self, place: int, record: SampleRecord, size: Size) -> Tensor:
        """Read pixels of a sample that was inspected before. Raises UserError if it has changed since."""
        name = self.samples.name(place)
        try:
            data, _ = self.samples.read(place)
        except (OSError, UnusableSample) as error:
            raise UserError(f"{name} of {self.name} is not there any more ({error}).") from None
        if _hash(data) != record.image:
            raise UserError(f"{name} of {self.name} has another content than when it was listed.")
        return pixels(fit_to_size(read_picture(data), size))

    def _size(self, record: SampleRecord) -> Size | None:
        if record.problem is not None:
            return None
        return choose_bucket(record.width, record.height, self.resolutions, self.enlarge)

    # The index

    def _stored_part(self, number: int, count: int) -> list[SampleRecord] | None:
        stored = self.encoded.store.read_json(f"{self._index}/{number:06}")
        if not isinstance(stored, list) or len(stored) != count:
            return None
        return [SampleRecord(**fields) for fields in stored]

    def _store_part(self, number: int, records: Sequence[SampleRecord]) -> None:
        self.encoded.store.write_json(f"{self._index}/{number:06}", [asdict(record) for record in records])

    def _read_part(self, number: int) -> list[SampleRecord]:
        """Read records from the index, or inspect the samples now."""
        places = range(len(self.samples))[number * PART : (number + 1) * PART]
        records = self._stored_part(number, len(places))
        if records is None:
            records = [self._look(place)[0] for place in places]
            self._store_part(number, records)
        return records

    def _record(self, place: int) -> SampleRecord:
        return self._part(place // PART)[place % PART]

    def _listed(self) -> dict[bool, Buckets]:
        """Return the samples of every bucket, by image size: of those that are held out, and of the others."""
        if self._buckets is None:
            if self._rank is None:
                self.prepare()
            usable: list[tuple[int, Size, str]] = []
            problems: LeftOut = {}
            for place in range(len(self.samples)):
                record = self._record(place)
                size = self._size(record)
                if size is None:
                    name = self.samples.name(place) + (f": {record.reason}" if record.reason else "")
                    problems.setdefault(record.problem or TOO_SMALL, []).append(name)
                else:
                    usable.append((place, size, record.image))
            self.left_out = merge_left_out((self.samples.left_out, problems))
            if not usable:
                raise self._nothing_usable(self.left_out)
            if self.left_out and self._rank == 0:
                log.warning("%s: left out %s.", self.name, describe_left_out(self.left_out))
            sides: dict[bool, dict[Size, list[int]]] = {False: {}, True: {}}
            chosen = choose_held_out([image for _, _, image in usable], self.share)
            for (place, size, _), side in zip(usable, chosen, strict=True):
                sides[side].setdefault(size, []).append(place)
            self._buckets = {side: sorted(found.items()) for side, found in sides.items()}
        return self._buckets

    def _nothing_usable(self, left_out: LeftOut) -> UserError:
        return UserError(
            f"No usable sample. Looked for {self.samples.expected}"
            f", large enough for resolution {min(self.resolutions)} when enlarged at most {self.enlarge:g} times. "
            f"Found {describe_left_out(left_out)}."
        )

    # Batches

    def buckets(self) -> list[tuple[Size, int]]:
        """Return image sizes and their numbers of samples. Raises UserError if no sample is usable."""
        counts: Counter[Size] = Counter()
        for side in self._listed().values():
            counts.update({size: len(places) for size, places in side})
        return sorted(counts.items())

    def split_text(self) -> str:
        counts = {side: sum(len(places) for _, places in found) for side, found in self._listed().items()}
        return split_text(sum(counts.values()), counts[True])

    def _side(self, held_out: bool) -> Buckets:
        """Return the buckets of one side; all samples if none is held out."""
        return self._listed()[held_out] or self._listed()[False]

    def _new_order(self, size: int, seed: int, held_out: bool) -> BucketOrder:
        return BucketOrder([len(places) for _, places in self._side(held_out)], size, seed)

    def batch(self, index: int, size: int, seed: int, *, held_out: bool = False) -> Batch:
        """Return samples of one bucket; see BucketOrder."""
        bucket, chosen = self._order(size, seed, held_out).batch(index)
        image_size, places = self._side(held_out)[bucket]
        latents, captions = [], []
        for place in (places[number] for number in chosen):
            record = self._record(place)
            give = partial(self._pixels, place, record, image_size)
            latents.append(self.encoded.latents(record.image, image_size, self.samples.name(place), give))
            captions.append(record.caption)
        texts = self.encode_prompts(captions)
        guidance_B = draw_guidance(self.guidance, index, size, seed)
        batch = latent_batch(torch.stack(latents), texts.context_BLD, texts.pooled_BV, guidance_B, texts.words_BL)
        batch.captions = tuple(captions)
        return batch

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """Decode to images [B, 3, P, P] in 0..1; None without an autoencoder."""
        return self.encoded.decode(tokens_BTC, image_ids_T3)

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        """Read encoded prompts from the store, or make and keep them."""
        return self.encoded.encode_prompts(prompts)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""The demo's emoji dataset as a source of any number of images; also its fixed prompts and its scorer.

This is the only module of the trainer that imports the demo, by name and when it is used: an installed package has none.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from .batch import GUIDANCE, Batch, Progress, Texts, latent_batch, tokens_to_latents
from .held_out import choose_held_out, split_text
from .order import sample_order
from .store import DamagedEntry, Store, content_key

log = logging.getLogger(__name__)

EMOJI_SHIFT = 1.15  # time shift of the schedule that the emoji FLUX is sampled with
_POOL_SEED, POOL_PART = 300, 32  # seed of the pool; pictures per entry of the store


def asset(name: str, assets: Path | None = None) -> Path:
    """Return the path of one of the demo's files. Raises UserError if it is missing."""
    file = (assets or _demo("dataset").ASSETS) / f"{name}.safetensors"
    if not file.is_file():
        raise UserError(f"{file} is missing; demo/README.md says how to make it.")
    return Path(file)


class EmojiTextEncoders:
    """The demo's prompt encoder, in place of CLIP and T5."""

    dtype = torch.float32

    def __init__(self, assets: Path | None = None) -> None:
        file = asset("prompt-encoder", assets)
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        self.encoder = _demo("prompt_encoder").load_prompt_encoder(file)

    def encode(self, prompts: Sequence[str]) -> Texts:
        context, pooled = self.encoder.encode(list(prompts))
        return Texts(context, pooled, self.encoder.tokens(list(prompts)) != 0)

    def release(self) -> None:
        """Does nothing: the model is small."""


class EmojiAutoencoder:
    """The demo's autoencoder, in place of FLUX's."""

    def __init__(self, assets: Path | None = None) -> None:
        file = asset("vae/emoji-autoencoder", assets)
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        self.autoencoder = _demo("autoencoder").TinyAutoencoder.load(file)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # off by 0.7 %, in half the time
            latents: Tensor = self.autoencoder.encode(images)
        return latents.float()

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.autoencoder.decode(latents)
        return images

    def release(self) -> None:
        """Does nothing: the model is small."""


class EmojiData:
    """Emoji pictures, encoded by the demo's autoencoder and prompt encoder: endlessly many, or a pool of fixed size.

    Without a pool every batch has new pictures. Those of a pool are encoded once and kept in the store, and batches are
    permutations of them; only the captions' wording and the guidance are drawn anew.
    """

    name = "emoji"

    def __init__(
        self,
        assets: Path | None = None,
        *,
        guidance: tuple[float, float] = GUIDANCE,
        pool: int | None = None,
        store: Store | None = None,
        held_out: float = 0.0,
    ) -> None:
        """`pool`: number of pictures in the pool, which needs a store. `held_out`: share of them that is held out."""
        self.dataset = _demo("dataset")
        self.guidance = guidance
        self.autoencoder = EmojiAutoencoder(assets)
        self.text_encoders = EmojiTextEncoders(assets)
        self.pool = None
        self.identity = "emoji"
        if pool is not None:
            assert store is not None
            self.pool = EmojiPool(self.dataset, self.autoencoder, pool, store, held_out)
            self.identity = f"emoji, {pool} pictures" + (f", {held_out} held out" if held_out else "")

    def prepare(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
        """Encode the missing part of this rank's share of the pool."""
        if self.pool is not None:
            self.pool.prepare(rank, world, progress)

    def split_text(self) -> str:
        if self.pool is None:
            return "Every batch has new pictures; those of the validation are drawn from another seed."
        return split_text(self.pool.count, len(self.pool.sides[True]))

    def batch(self, index: int, size: int, seed: int, *, held_out: bool = False) -> Batch:
        generator = np.random.default_rng((seed, index))
        if self.pool is None:
            pictures = [self.dataset.random_picture(generator) for _ in range(size)]
            latents = self.autoencoder.encode(torch.stack([self.dataset.render(picture) for picture in pictures]))
        else:
            places = self.pool.sides[held_out] or self.pool.sides[False]
            numbers = [places[number] for number in sample_order(len(places), index * size, size, (seed,))]
            pictures, latents = self.pool.chosen(numbers)
        templates = generator.integers(len(self.dataset.CAPTION_TEMPLATES), size=size)
        captions = [picture.caption(int(template)) for picture, template in zip(pictures, templates, strict=True)]
        context, pooled, words = self.encode_prompts(captions)
        guidance = torch.from_numpy(generator.uniform(*self.guidance, size))
        batch = latent_batch(latents, context, pooled, guidance, words)
        batch.captions = tuple(captions)
        return batch

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """Decode to images [B, 3, 128, 128] in 0..1."""
        return self.autoencoder.decode(tokens_to_latents(tokens_BTC, image_ids_T3))

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        return self.text_encoders.encode(prompts)


class EmojiPool:
    """A fixed set of training pictures; a larger pool begins with those of a smaller one."""

    def __init__(
        self, dataset: Any, autoencoder: EmojiAutoencoder, count: int, store: Store, held_out: float = 0.0
    ) -> None:
        self.dataset, self.autoencoder, self.count, self.store = dataset, autoencoder, count, store
        generator = np.random.default_rng(_POOL_SEED)
        whole = -(-count // POOL_PART) * POOL_PART
        pictures = [dataset.random_picture(generator) for _ in range(whole)]
        self.parts = [pictures[start : start + POOL_PART] for start in range(0, whole, POOL_PART)]
        chosen = choose_held_out([str(picture) for picture in pictures[:count]], held_out)
        self.sides = {side: [place for place, other in enumerate(chosen) if other == side] for side in (False, True)}
        self._latents: Tensor | None = None

    def prepare(self, rank: int, world: int, progress: Progress | None) -> None:
        share = self.parts[rank::world]
        for done, pictures in enumerate(share, start=1):
            self._encoded(pictures)
            if progress is not None:
                progress(done * POOL_PART, len(share) * POOL_PART)

    def chosen(self, numbers: Sequence[int]) -> tuple[list[Any], Tensor]:
        """Return pictures by their numbers, and their latents [n, 16, 16, 16]."""
        if self._latents is None:
            self._latents = torch.cat([self._encoded(pictures) for pictures in self.parts])
        pictures = [self.parts[number // POOL_PART][number % POOL_PART] for number in numbers]
        return pictures, self._latents[torch.tensor(numbers)].float()

    def _encoded(self, pictures: Sequence[Any]) -> Tensor:
        """Read latents from the store, or make and keep them; bfloat16, as the autoencoder runs."""
        key = content_key("emoji", self.autoencoder.identity, _hash(self.dataset.render(pictures[0])), *pictures)
        try:
            if (found := self.store.get("pool", key)) is not None:
                return found["latents"]
        except DamagedEntry as error:
            log.warning("%s; it is encoded again.", error)
        latents = self.autoencoder.encode(torch.stack([self.dataset.render(picture) for picture in pictures]))
        self.store.put("pool", key, {"latents": latents.bfloat16()})
        return latents.bfloat16()


def prompt_pictures() -> list[Any]:
    """Return the pictures that the demo's 500 fixed prompts describe, as demo.dataset.Picture."""
    return list(_demo("dataset").prompts())


def picture_metadata(picture: Any) -> dict[str, Any]:
    """Return a picture's entry in GenEval's evaluation_metadata.jsonl, with its colour and position."""
    dataset = _demo("dataset")
    return {
        "tag": "emoji",
        "include": [{"class": dataset.objects()[picture.object], "count": 1}],
        "colour": tuple(dataset.COLOURS)[picture.colour],
        "position": tuple(dataset.POSITIONS)[picture.position],
        "prompt": picture.caption(),
    }


def picture_hits(images: Tensor, pictures: Sequence[Any]) -> dict[str, Tensor]:
    """Score images [N, 3, 128, 128] in 0..1 with the demo's scorer: for each measure, whether each image is right."""
    scorer = _demo("scorer").Scorer()
    hits: dict[str, Tensor] = scorer.hits(images, pictures)
    return hits | {"retrieval": scorer.retrieved(images, pictures)}


def _hash(image: Tensor) -> str:
    """Hash a picture, to notice when the sprites or their composition change."""
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def _demo(module: str) -> Any:
    """Import a module of the demo. Raises UserError where there is no demo."""
    try:
        return importlib.import_module(f"demo.{module}")
    except ModuleNotFoundError as error:
        if error.name != "demo":
            raise
        raise UserError("The emoji dataset is the demo's: run from the repository's root.") from None

"""Encoders behind the store: entries are read from it, or made and kept; damaged entries are made again.

Shapes: B batch, T image tokens, C channels of a token, P pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .. import UserError
from .batch import Texts, tokens_to_latents
from .buckets import Size
from .encoders import ImageAutoencoder, TextEncoders, no_text_encoders
from .store import DamagedEntry, Store, content_key

log = logging.getLogger(__name__)


class AbsentEncoders:
    """Stands in for encoders that are missing where the store has their results: only entries not in the store fail."""

    dtype = torch.float32

    def __init__(self, identity: str, error: UserError) -> None:
        self.identity, self.error = identity, error

    def encode(self, _: object) -> NoReturn:
        raise self.error

    def decode(self, _: object) -> NoReturn:
        raise self.error

    def release(self) -> None:
        """Does nothing: no model is loaded."""


class Encoded:
    """Latents and text features by content. Call `release` when encoders are not needed for a while."""

    def __init__(self, store: Store, autoencoder: ImageAutoencoder | None, text_encoders: TextEncoders | None) -> None:
        self.store, self.autoencoder, self.text_encoders = store, autoencoder, text_encoders

    @property
    def identity(self) -> str:
        """Identity of the encoders."""
        return content_key(*(part and part.identity for part in (self.autoencoder, self.text_encoders)))

    def has_text(self, prompt: str) -> bool:
        return self.store.has("text", self._text_key(prompt))

    def texts(self, prompts: Sequence[str]) -> Texts:
        """Return encoded prompts. Raises UserError for a prompt that is not in the store, without text encoders."""
        rows = [self._text(prompt) for prompt in prompts]
        return Texts(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def has_latents(self, image: str, size: Size) -> bool:
        """Return whether the store has an image at this size. `image`: hash of its file."""
        return self.store.has("latents", self._latents_key(image, size))

    def latents(self, image: str, size: Size, name: str, pixels: Callable[[], Tensor]) -> Tensor:
        """Return latents [channels, height, width] of an image at `size`.

        `pixels` gives [3, height, width] if they have to be made; `name` is the sample's, for messages. Raises UserError
        if they cannot be made.
        """

        def make() -> dict[str, Tensor]:
            if self.autoencoder is None:
                raise UserError("No autoencoder is known: set data.vae to a diffusers FLUX pipeline.")
            return {"latents": self.autoencoder.encode(pixels()[None])[0]}

        return self._entry("latents", self._latents_key(image, size), name, make)["latents"].float()

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """Decode to images [B, 3, P, P] in 0..1, and free the encoders; None without an autoencoder."""
        if self.autoencoder is None or isinstance(self.autoencoder, AbsentEncoders):
            return None
        try:
            return self.autoencoder.decode(tokens_to_latents(tokens_BTC, image_ids_T3))
        finally:
            self.release()

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        """Return encoded prompts, and free the encoders."""
        try:
            return self.texts(prompts)
        finally:
            self.release()

    def release(self) -> None:
        """Free the encoders' memory; they are loaded again when an entry is missing."""
        for part in (self.autoencoder, self.text_encoders):
            if part is not None:
                part.release()

    def _text(self, prompt: str) -> Texts:
        def make() -> dict[str, Tensor]:
            if self.text_encoders is None:
                raise no_text_encoders()
            context, pooled, words = self.text_encoders.encode([prompt])
            dtype = self.text_encoders.dtype
            return {"context": context.to(dtype), "pooled": pooled.to(dtype), "words": words}

        entry = self._entry("text", self._text_key(prompt), repr(prompt), make)
        return Texts(entry["context"].float(), entry["pooled"].float(), entry["words"])

    def _entry(self, kind: str, key: str, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        damage = None
        try:
            if (found := self.store.get(kind, key)) is not None:
                return found
        except DamagedEntry as error:
            damage = error
            log.warning("%s; it is made again from %s.", error, name)
        try:
            made = make()
        except UserError as error:
            if damage is None:
                raise
            raise UserError(f"{damage}, and cannot be made again from {name}: {error}") from None
        self.store.put(kind, key, made)
        return made

    def _text_key(self, prompt: str) -> str:
        return content_key("text", self.text_encoders and self.text_encoders.identity, prompt)

    def _latents_key(self, image: str, size: Size) -> str:
        return content_key("latents", self.autoencoder and self.autoencoder.identity, image, *size)

"""Sources of training samples. `open_data` opens one by name, `open_source` the one of a run's section `data`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from .. import UserError
from ..run_config import DataSection
from .batch import GUIDANCE, DataSource
from .emoji import EmojiAutoencoder, EmojiData, EmojiTextEncoders
from .encoded import AbsentEncoders, Encoded
from .encoders import FluxAutoencoder, FluxTextEncoders, ImageAutoencoder, TextEncoders
from .folder import FolderSamples
from .held_out import WithHeldOut
from .latents import LatentFile
from .pictures import PictureSource
from .prompts import PromptSource
from .samples import Samples
from .shards import ShardSamples
from .store import Store, content_key
from .tables import TableSamples

_Encoder = TypeVar("_Encoder", TextEncoders, ImageAutoencoder)


def open_data(name: str) -> DataSource:
    """Open `emoji`, or a file of precomputed latents (latents.LATENTS_FORMAT) by its path."""
    return EmojiData() if name == "emoji" else LatentFile(Path(name))


def open_source(
    section: DataSection,
    output_dir: Path,
    *,
    guidance: tuple[float, float] = GUIDANCE,
    device: torch.device | str = "cpu",
) -> DataSource:
    """Open the source that a run's section `data` describes. Its encoders are loaded on demand and run on `device`.

    Raises UserError if data or encoders are missing, or are not what the section says.
    """
    if isinstance(section.held_out, Path):
        training, validation = (
            section.model_copy(update={"held_out": 0.0, "path": path}) for path in (section.path, section.held_out)
        )
        sources = (open_source(part, output_dir, guidance=guidance, device=device) for part in (training, validation))
        return WithHeldOut(*sources)
    share = section.held_out
    store = Store(section.cache or output_dir / "cache")
    if section.source == "emoji":
        return EmojiData(guidance=guidance, pool=section.pool, store=store, held_out=share)
    path = section.path
    assert path is not None  # DataSection requires it
    encoded = Encoded(store, _autoencoder(section, store, device), _text_encoders(section, store, device))
    if section.source == "latents":
        return LatentFile(path, guidance=guidance, encoded=encoded, held_out=share)
    if section.source == "prompts":
        return PromptSource(path, encoded, resolutions=section.resolutions, guidance=guidance, held_out=share)
    samples: Samples
    if section.source == "folder":
        samples = FolderSamples(path)
    elif section.source == "webdataset":
        samples = ShardSamples(path, store, section.caption_column)
    else:
        samples = TableSamples(path, section.image_column, section.caption_column)
    return PictureSource(
        path.name,
        samples,
        encoded,
        resolutions=section.resolutions,
        enlarge=section.enlarge,
        guidance=guidance,
        held_out=share,
    )


def _text_encoders(section: DataSection, store: Store, device: torch.device | str) -> TextEncoders | None:
    name, tokens, dtype = section.text_encoders, section.text_tokens, getattr(torch, section.encoder_dtype)
    if name is None:
        return None
    if name == "emoji":
        return EmojiTextEncoders()
    return _or_known(store, f"{name} {tokens} {dtype}", lambda: FluxTextEncoders(name, tokens, dtype, device))


def _autoencoder(section: DataSection, store: Store, device: torch.device | str) -> ImageAutoencoder | None:
    name, dtype = section.vae, getattr(torch, section.encoder_dtype)
    if name is None:
        return None
    if name == "emoji":
        return EmojiAutoencoder()
    return _or_known(store, f"vae {name} {dtype}", lambda: FluxAutoencoder(name, dtype, device))


def _or_known(store: Store, label: str, make: Callable[[], _Encoder]) -> _Encoder | AbsentEncoders:
    """Make encoders and remember their identity in the store; where they are missing, stand in for them by what it knows."""
    entry = f"encoders/{content_key(label)}"
    known = store.read_json(entry)
    try:
        made = make()
    except UserError as error:
        if known is None:
            raise
        return AbsentEncoders(known, error)
    if known != made.identity:
        store.write_json(entry, made.identity)
    return made

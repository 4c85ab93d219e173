"""Where training samples come from. `open_data` is the door for a name, `open_source` for a run's section `data`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..run_config import DataSection
from .batch import GUIDANCE, DataSource, Progress
from .emoji import EmojiAutoencoder, EmojiData, EmojiTextEncoders
from .encoders import Autoencoder, FluxAutoencoder, FluxTextEncoders, TextEncoders
from .latents import LatentFile


def open_data(name: str) -> DataSource:
    """`emoji`, or the path of a file of latents.FILE_FORMAT."""
    return EmojiData() if name == "emoji" else LatentFile(Path(name))


def open_source(
    section: DataSection,
    output_dir: Path,
    *,
    guidance: tuple[float, float] = GUIDANCE,
    device: torch.device | str = "cpu",
) -> DataSource:
    """The source that a run's section `data` describes; its encoders, once they are needed, run on `device`.

    Raises UserError if the data, or what the section says of them, are not there.
    """
    if section.source == "emoji":
        return EmojiData(guidance=guidance)
    assert section.path is not None  # DataSection has seen to that
    autoencoder, text_encoders = _autoencoder(section, device), _text_encoders(section, device)
    return LatentFile(section.path, guidance, autoencoder, text_encoders)


def prepare(source: DataSource, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
    """This rank's share of the cache, so that training needs no encoders. Every rank has to, and to wait for the others."""
    source.prepare(rank, world, progress)


def _text_encoders(section: DataSection, device: torch.device | str) -> TextEncoders | None:
    if section.text_encoders is None:
        return None
    if section.text_encoders == "emoji":
        return EmojiTextEncoders()
    return FluxTextEncoders(section.text_encoders, section.text_tokens, getattr(torch, section.encoder_dtype), device)


def _autoencoder(section: DataSection, device: torch.device | str) -> Autoencoder | None:
    if section.vae is None:
        return None
    if section.vae == "emoji":
        return EmojiAutoencoder()
    return FluxAutoencoder(section.vae, getattr(torch, section.encoder_dtype), device)

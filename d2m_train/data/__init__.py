"""Where training samples come from. `open_data` is the door."""

from __future__ import annotations

from pathlib import Path

from .batch import DataSource
from .emoji import EmojiData
from .latents import LatentFile


def open_data(name: str) -> DataSource:
    """`emoji`, or the path of a file of latents.FILE_FORMAT."""
    return EmojiData() if name == "emoji" else LatentFile(Path(name))

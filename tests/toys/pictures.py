"""Small images with captions, as files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(64, 64)] * 5 + [(96, 48)] * 3 + [(48, 96)]


def png(width: int, height: int, seed: int = 0) -> bytes:
    """The bytes of a file: a few large coloured patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    return "a photo of a red cat" + " on a hill" * (number % 3) + f", {'blue ' * (number // 3)}tree"


def save_images(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """00.png with 00.txt, and so on."""
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        (folder / f"{number:02}.png").write_bytes(png(width, height, seed=number))
        (folder / f"{number:02}.txt").write_text(caption(number) + "\n")
    return folder

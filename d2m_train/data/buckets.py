"""Aspect-ratio buckets: the image sizes that training uses, and fitting images to them."""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from d2m_model.config import PATCH_PIXELS

Size = tuple[int, int]  # width and height in pixels

_STEPS = 8  # sizes between the square and the longest bucket, whose sides are 1 : 4
_SHORTEST = 0.5  # short side of the longest bucket, as a fraction of the square's


@cache
def buckets(resolution: int) -> tuple[Size, ...]:
    """Return sizes of about resolution² pixels, from the square to 1 : 4 both ways; sides are multiples of PATCH_PIXELS."""
    step = max(PATCH_PIXELS, round(resolution * (1 - _SHORTEST) / _STEPS / PATCH_PIXELS) * PATCH_PIXELS)
    sizes = set()
    for short in range(resolution, math.ceil(resolution * _SHORTEST) - 1, -step):
        long = max(PATCH_PIXELS, round(resolution**2 / short / PATCH_PIXELS) * PATCH_PIXELS)
        sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


@lru_cache(maxsize=1 << 16)
def choose_bucket(width: int, height: int, resolutions: tuple[int, ...], enlarge: float) -> Size | None:
    """Return the bucket with the nearest aspect ratio, at the largest resolution that enlarges the image by `enlarge` or less.

    None if the image is too small for every resolution.
    """
    for resolution in sorted(resolutions, reverse=True):
        size = min(buckets(resolution), key=lambda size: abs(math.log(size[0] / size[1] * height / width)))
        if max(size[0] / width, size[1] / height) <= enlarge:
            return size
    return None


def fit_to_size(image: Image.Image, size: Size) -> Image.Image:
    """Resize and crop around the centre to `size`."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def pixels(image: Image.Image) -> Tensor:
    """Return an image's pixels [3, height, width], float32 in 0..1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255

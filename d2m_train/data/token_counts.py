"""How many tokens a run's samples have, told by its configuration before any data are read."""

from __future__ import annotations

from d2m_model.config import PATCH_LATENTS, PATCH_PIXELS
from d2m_model.cost import Tokens
from d2m_model.tensor_file import TensorFile

from ..run_config import DataSection

_EMOJI = Tokens(image=64, text=12)


def longest_sample(data: DataSection) -> Tokens:
    """Maximum tokens of a sample; the exact number for emoji and latents, whose samples are all of one size."""
    if data.source == "emoji":
        return _EMOJI
    if data.source == "latents" and data.path is not None and data.path.exists():
        with TensorFile(data.path) as file:
            height, width = file.shapes["latents"][2:]
            return Tokens(image=(height // PATCH_LATENTS) * (width // PATCH_LATENTS), text=file.shapes["context"][1])
    return Tokens(image=(max(data.resolutions) // PATCH_PIXELS) ** 2, text=data.text_tokens)


def mean_sample(data: DataSection) -> float:
    """Mean tokens of a sample, image and text together."""
    longest = longest_sample(data)
    if data.source in ("emoji", "latents"):
        return longest.joint
    sides = data.resolutions
    return sum((side // PATCH_PIXELS) ** 2 for side in sides) / len(sides) + longest.text

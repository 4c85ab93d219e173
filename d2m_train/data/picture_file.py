"""Reading of picture files as viewers show them, and the reason where that is impossible."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

_MAX_PIXELS = 1 << 29  # Pillow refuses twice as many
_MAX_TEXT = 256 << 20  # bytes of text in a PNG: workflows and raw metadata are longer than Pillow's 1 MiB
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PROBE = b"\x2a\x55\xaa\x15" * 64  # image data that stands for nothing
_REASON = 80  # characters


class UnreadablePicture(Exception):
    """The file is not a picture that can be shown; the message is the reason, in a few words."""


def read_picture(data: bytes) -> Image.Image:
    """Decode a picture file: RGB, upright, on a white background. Raises UnreadablePicture."""
    Image.MAX_IMAGE_PIXELS = _MAX_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT
    try:
        return upright(_decoded(data))
    except UnidentifiedImageError:
        raise UnreadablePicture("not a picture that Pillow knows") from None
    except Exception as error:  # Pillow's plugins raise errors of any type
        reason = (str(error) or type(error).__name__).splitlines()[0][:_REASON]
        raise UnreadablePicture(reason) from None


def _decoded(data: bytes) -> Image.Image:
    """Decode all of a file. A JPEG may lack its end mark, if that alone is missing."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except OSError as error:
        if not data.startswith(_JPEG) or "truncated" not in str(error):
            raise
        body = data.removesuffix(_JPEG_END[:1])
        image = Image.open(io.BytesIO(body + _JPEG_END))
        # Where image data are missing, other data in their place give other pixels.
        probed = Image.open(io.BytesIO(body + _PROBE + _JPEG_END))
        if image.tobytes() != probed.tobytes():
            raise
    return image


def upright(image: Image.Image) -> Image.Image:
    """Convert to RGB, rotated as its EXIF data say, on a white background."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that are none say nothing on how to hold the picture
        image = image.copy()
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale integers of 16 or 32 bits, or floats, to 0..255; Pillow cuts them off at 255.

    Floats up to 1 are shares of white. Other values are of the narrowest type that holds the brightest: 8, 16 or 32 bits;
    of a 16-bit picture (mode I;16) they are 16 bits.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    brightest = values.max(initial=0)
    white = next((white for white in (2.0**8 - 1, 2.0**16 - 1) if brightest <= white), 2.0**32 - 1)
    if image.mode == "F" and brightest <= 1:
        white = 1.0
    elif image.mode.startswith("I;16"):
        white = 2.0**16 - 1
    elif image.mode == "I":
        white = max(white, 2.0**16 - 1)  # PNGs of 16 bits have this mode in older versions of Pillow
    return Image.fromarray(np.rint((values / white).clip(0, 1) * 255).astype(np.uint8))

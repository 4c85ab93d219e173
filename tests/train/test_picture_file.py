"""Pictures are read as viewers show them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from d2m_train.data.picture_file import UnreadablePicture, read_picture

GREY = np.linspace(0, 1, 64).reshape(8, 8)
SHOWN = np.rint(GREY * 255)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize((160, 120))


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (np.rint(GREY * 65535).astype(np.uint16), "PNG"),
        (np.rint(GREY * 65535).astype(np.uint16), "TIFF"),
        (np.rint(GREY * 65535).astype(np.int32), "TIFF"),
        (GREY.astype(np.float32), "TIFF"),
        ((GREY * 255).astype(np.float32), "TIFF"),
        ((GREY * 65535).astype(np.float32), "TIFF"),
    ],
)
def test_grey_of_many_bits_is_neither_white_nor_black(values: np.ndarray, form: str) -> None:
    read = np.asarray(read_picture(encoded(Image.fromarray(values), form)), dtype=float)
    assert np.abs(read - SHOWN[..., None]).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark() -> None:
    read = read_picture(encoded(Image.fromarray(np.full((8, 8), 200, np.uint16))))
    assert read.getextrema() == ((1, 1),) * 3


def test_malformed_exif_and_much_text_are_passed_over() -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("workflow", "x" * 3_000_000, zip=True)
    assert read_picture(encoded(photo(), pnginfo=about)).size == (160, 120)
    assert read_picture(encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")).size == (160, 120)


def test_a_jpeg_may_lack_its_end_mark_and_nothing_else() -> None:
    for options in ({}, {"progressive": True}):
        whole = encoded(photo(), "JPEG", **options)
        for missing in (1, 2):
            assert read_picture(whole[:-missing]).tobytes() == read_picture(whole).tobytes()
        with pytest.raises(UnreadablePicture, match="truncated"):
            read_picture(whole[: len(whole) * 3 // 4])


def test_a_picture_of_very_many_pixels_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_picture(encoded(photo())).size == (160, 120)


def test_the_reason_is_said() -> None:
    for data, reason in ((b"nothing", "not a picture that Pillow knows"), (encoded(photo())[:200], "truncated|broken")):
        with pytest.raises(UnreadablePicture, match=reason):
            read_picture(data)

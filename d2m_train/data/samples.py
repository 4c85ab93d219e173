"""Images with captions, wherever they lie: what a collection of them offers, and what may be wrong with one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
CAPTION_NAMES = ("caption", "text", "prompt", "description")  # of columns and fields, the likelier first
_NAMED = 3  # of the samples left out, so many are named

# Why a sample is left out.
IMAGE_ALONE, CAPTION_ALONE, EMPTY_CAPTION = "image without a caption", "caption without an image", "empty caption"
BROKEN_IMAGE, UNREADABLE, TOO_SMALL = "broken image", "unreadable file", "image that is too small"

LeftOut = dict[str, list[str]]  # names by reason


class UnusableSample(Exception):
    """A sample that is left out; the message is the reason, one of the above."""


class Samples(Protocol):
    """A listed collection. Listing looks at names, sizes and times only; `read` may find more that is wrong."""

    expected: str  # what was looked for, for messages
    identity: str  # changes with the listing
    left_out: LeftOut  # what the listing already tells

    def __len__(self) -> int: ...

    def name(self, place: int) -> str: ...

    def read(self, place: int) -> tuple[bytes, str]:
        """An image file's bytes, and the caption without surrounding space. Raises UnusableSample, or OSError."""
        ...


class _Listed(NamedTuple):
    """What grouping files by name gives: complete samples, and the names of what stands alone, by reason."""

    complete: list[tuple[str, Any, Any]]  # name, image and caption, as they were given
    left_out: LeftOut


def pair_files(images: Sequence[tuple[str, str, Any]], captions: Mapping[str, tuple[str, Any]]) -> _Listed:
    """Images (key, name, image) with the captions key → (name, caption) of their keys."""
    complete = [(name, image, captions[key][1]) for key, name, image in images if key in captions]
    keys = {key for key, _, _ in images}
    left_out = {
        IMAGE_ALONE: [name for key, name, _ in images if key not in captions],
        CAPTION_ALONE: [name for key, (name, _) in captions.items() if key not in keys],
    }
    return _Listed(complete, {reason: names for reason, names in left_out.items() if names})


def caption_text(data: bytes) -> str:
    """A caption file's text. Raises UnusableSample if there is none."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UnusableSample(UNREADABLE) from None
    if not text:
        raise UnusableSample(EMPTY_CAPTION)
    return text


def describe_left_out(left_out: LeftOut) -> str:
    """`2 × broken image (a.png, b.png), …`: for logs and messages."""
    parts = []
    for reason, names in left_out.items():
        more = ", …" if len(names) > _NAMED else ""
        parts.append(f"{len(names):,} × {reason} ({', '.join(names[:_NAMED])}{more})")
    return ", ".join(parts) or "nothing"


def merge_left_out(left_outs: Iterable[LeftOut]) -> LeftOut:
    found: LeftOut = {}
    for left_out in left_outs:
        for reason, names in left_out.items():
            found.setdefault(reason, []).extend(names)
    return found

"""Collections of images with captions: their interface, and reasons for leaving a sample out."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from d2m_model.foreign import printable

from ..text_file import decode_text

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
CAPTION_NAMES = ("caption", "text", "prompt", "description")  # names of columns and fields, the likeliest first
_NAMED = 3  # samples named in a message, for each reason

# Reasons for leaving a sample out.
IMAGE_ALONE, CAPTION_ALONE, EMPTY_CAPTION = "image without a caption", "caption without an image", "empty caption"
BROKEN_IMAGE, UNREADABLE, TOO_SMALL = "broken image", "unreadable file", "image that is too small"
NO_CAPTION = "line without image and caption"
NO_ROLE = "member that is no image and no caption"
NO_FILE, FOLDER_UNREADABLE = "link to nowhere, or pipe or device", "unreadable folder"

LeftOut = dict[str, list[str]]  # names by reason


class UnusableSample(Exception):
    """The sample is left out; the message is one of the reasons above."""


class Samples(Protocol):
    """A listed collection. Listing reads only names, sizes and times, so `read` can fail on samples that it lists."""

    expected: str  # description of usable samples, for messages
    identity: str  # changes whenever the listing does
    left_out: LeftOut  # as far as the listing shows it

    def __len__(self) -> int: ...

    def name(self, place: int) -> str: ...

    def read(self, place: int) -> tuple[bytes, str]:
        """Return an image file's bytes and the stripped caption. Raises UnusableSample or OSError."""
        ...


class _Listed(NamedTuple):
    """Result of pairing files by name: complete samples, and the names of the others by reason."""

    complete: list[tuple[str, Any, Any]]  # name, image and caption, as they were given
    left_out: LeftOut


def pair_files(images: Sequence[tuple[str, str, Any]], captions: Mapping[str, tuple[str, Any]]) -> _Listed:
    """Pair images (key, name, image) with the captions {key: (name, caption)} of the same key."""
    complete = [(name, image, captions[key][1]) for key, name, image in images if key in captions]
    keys = {key for key, _, _ in images}
    left_out = {
        IMAGE_ALONE: [name for key, name, _ in images if key not in captions],
        CAPTION_ALONE: [name for key, (name, _) in captions.items() if key not in keys],
    }
    return _Listed(complete, {reason: names for reason, names in left_out.items() if names})


def caption_text(data: bytes) -> str:
    """Decode a caption file. Raises UnusableSample if it has no text."""
    try:
        text = decode_text(data).strip()
    except ValueError:
        raise UnusableSample(UNREADABLE) from None
    if not text:
        raise UnusableSample(EMPTY_CAPTION)
    return text


def caption_of_fields(fields: Any, names: Sequence[str], sample: str) -> str:
    """Return the caption in the first of these fields that has one. Of a list, one is drawn, always the same for a sample.

    Raises UnusableSample if there is none.
    """
    values = [fields.get(name) for name in names] if isinstance(fields, dict) else []
    for value in values:
        if caption := drawn_caption(value, sample):
            return caption
    raise UnusableSample(EMPTY_CAPTION if values else UNREADABLE)


def drawn_caption(value: Any, sample: str) -> str:
    """Return a caption, or one of a list of captions, stripped; empty if there is none."""
    texts = value if isinstance(value, list) else [value]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        return ""
    return captions[int(hashlib.sha256(sample.encode(errors="surrogatepass")).hexdigest()[:8], 16) % len(captions)]


def describe_left_out(left_out: LeftOut) -> str:
    """Describe samples left out, for messages: `2 × broken image (a.png, b.png), …`."""
    parts = []
    for reason, names in left_out.items():
        more = ", …" if len(names) > _NAMED else ""
        shown = ", ".join(printable(name) for name in names[:_NAMED])  # old names may be in no known encoding
        parts.append(f"{len(names):,} × {reason} ({shown}{more})")
    return ", ".join(parts) or "nothing"


def merge_left_out(left_outs: Iterable[LeftOut]) -> LeftOut:
    together: LeftOut = {}
    for left_out in left_outs:
        for reason, names in left_out.items():
            together.setdefault(reason, []).extend(names)
    return together


def matching_files(pattern: Path) -> list[Path]:
    """Return the files of a pattern, by name. Folders that exist are no patterns, whatever characters they have."""
    fixed = next((folder for folder in pattern.parents if folder.is_dir()), Path())
    rest = pattern.relative_to(fixed)
    return sorted(map(Path, glob.glob(str(Path(glob.escape(str(fixed))) / rest), recursive=True)))

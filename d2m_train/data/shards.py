"""WebDataset shards: tar files whose members are grouped by name, `key.jpg` with `key.txt` or `key.json`.

They are read by an index of their members' positions, not in sequence, so that a batch's samples follow from its number
and a run resumes exactly. The webdataset library only reads in sequence, which is why it is not used here.
"""

from __future__ import annotations

import glob
import itertools
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from d2m_model.foreign import read_json

from .. import UserError
from .samples import (
    CAPTION_NAMES,
    IMAGE_SUFFIXES,
    NO_ROLE,
    UNREADABLE,
    UnusableSample,
    caption_of_fields,
    caption_text,
    matching_files,
    merge_left_out,
    pair_files,
)
from .store import Store, content_key

_INDEX_VERSION = 2  # of the members' index


class _Span(NamedTuple):
    """Position of a member's bytes in a shard, and its file suffix."""

    shard: str
    start: int
    size: int
    suffix: str


class ShardSamples:
    """Samples in the shards of a folder, or of a pattern such as `data/{0000..0127}.tar` or `data/*.tar`."""

    def __init__(self, path: Path, store: Store, caption_field: str | None = None) -> None:
        """`store` keeps the shards' indices. `caption_field`: the caption's field in .json members."""
        shards = _shards(path)
        self.expected = (
            f"in {path} images ({' '.join(sorted(IMAGE_SUFFIXES))}), each with a .txt of the same name, or a .json with "
            f"{caption_field or ' or '.join(CAPTION_NAMES)}"
        )
        self._fields = (caption_field,) if caption_field else CAPTION_NAMES
        self._samples: list[tuple[str, _Span, _Span]] = []
        seen, alone = [], []
        for shard in shards:
            status = shard.stat()
            seen.append((shard.name, status.st_size, status.st_mtime_ns))
            images, captions, others = _indexed(shard, content_key(shard.absolute(), *seen[-1]), store)
            complete, left_out = pair_files(
                [(key, f"{shard.name}/{key}", span) for key, span in images.items()],
                {key: (f"{shard.name}/{key}", span) for key, span in captions.items()},
            )
            self._samples += complete
            alone += [left_out, {NO_ROLE: [f"{shard.name}/{name}" for name in others]} if others else {}]
        self.left_out = merge_left_out(alone)
        self.identity = content_key(*seen)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, place: int) -> str:
        return self._samples[place][0]

    def read(self, place: int) -> tuple[bytes, str]:
        _, image, caption = self._samples[place]
        text = _bytes(caption)
        if caption.suffix != ".json":
            return _bytes(image), caption_text(text)
        try:
            fields = read_json(text)
        except ValueError:
            raise UnusableSample(UNREADABLE) from None
        return _bytes(image), caption_of_fields(fields, self._fields, self.name(place))


def _bytes(span: _Span) -> bytes:
    with open(span.shard, "rb") as file:
        file.seek(span.start)
        return file.read(span.size)


def _indexed(shard: Path, key: str, store: Store) -> tuple[dict[str, _Span], dict[str, _Span], list[str]]:
    """Return a shard's images and captions by key, and its other members, from the store if it has been indexed before."""
    name = f"shards/{_INDEX_VERSION}/{key}"
    members = store.read_json(name)
    if members is None:
        members = _members(shard)
        store.write_json(name, members)
    images, captions = ({key: _Span(str(shard), *span) for key, span in part.items()} for part in members[:2])
    return images, captions, members[2]


def _members(shard: Path) -> tuple[dict[str, tuple[int, int, str]], dict[str, tuple[int, int, str]], list[str]]:
    images: dict[str, tuple[int, int, str]] = {}
    captions: dict[str, tuple[int, int, str]] = {}
    others: list[str] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                if not member.isreg() or file.startswith("."):
                    continue
                # WebDataset's rule: the key ends at the first dot of the file name.
                stem, _, suffix = file.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"
                span = (member.offset_data, member.size, suffix)
                if suffix in IMAGE_SUFFIXES:
                    images.setdefault(key, span)
                elif suffix in (".txt", ".caption") or (suffix == ".json" and key not in captions):
                    captions[key] = span
                elif suffix != ".json":
                    others.append(member.name)
    except (tarfile.TarError, OSError, EOFError) as error:
        packed = shard.suffix in (".gz", ".tgz", ".zst", ".bz2", ".xz")
        raise UserError(
            f"{shard}: {'a packed tar; unpack it to a plain one' if packed else f'not a complete tar file ({error})'}."
        ) from None
    return images, captions, others


def _shards(path: Path) -> list[Path]:
    """List the files of a folder or pattern, sorted. Raises UserError if there are none, or a range has gaps."""
    if path.is_dir():
        shards = sorted(path.rglob("*.tar"))
    elif path.is_file():
        shards = [path]
    else:
        shards = []
        for pattern in expand_braces(str(path)):
            if Path(pattern).is_file():
                shards.append(Path(pattern))
            elif glob.has_magic(pattern):
                shards += matching_files(Path(pattern))
            else:
                raise UserError(f"{pattern}: there is no such file (of {path}).")
    if not shards:
        raise UserError(
            f"{path}: no tar files. Expected a folder of .tar files, or a pattern: data/{{0000..0127}}.tar."
        )
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expand `a{0..2}.{x,y}` to a0.x, a0.y, a1.x, …; numbers keep their leading zeros."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            choices.append([piece])
        elif ends := re.fullmatch(r"(\d+)\.\.(\d+)", piece):
            first, last = ends.groups()
            choices.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        else:
            choices.append(piece.split(","))
    return ["".join(parts) for parts in itertools.product(*choices)]

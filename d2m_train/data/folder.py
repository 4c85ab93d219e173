"""Image folders: image files, and captions beside them: in .txt or .caption files of the same name, or a metadata.jsonl."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from d2m_model.foreign import read_json

from .. import UserError
from ..text_file import read_text
from .samples import (
    CAPTION_NAMES,
    FOLDER_UNREADABLE,
    IMAGE_SUFFIXES,
    NO_CAPTION,
    NO_FILE,
    LeftOut,
    UnusableSample,
    caption_of_fields,
    caption_text,
    merge_left_out,
    pair_files,
)
from .store import content_key

_CAPTIONS = (".txt", ".caption")  # the first wins
_METADATA = "metadata.jsonl"
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # not the user's


class FolderSamples:
    """All images below a folder, ordered by name; hidden files and folders, and those of operating systems, are skipped."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: {'a file' if path.exists() else 'there is no such folder'}; expected a folder.")
        self.expected = (
            f"images ({' '.join(sorted(IMAGE_SUFFIXES))}) below {path}, each with a .txt of the same name beside it "
            f"(or a .caption, or its line in a {_METADATA})"
        )
        images, seen = [], []
        captions: dict[str, tuple[str, Path | str]] = {}
        listed: dict[str, tuple[str, Path | str]] = {}
        problems: LeftOut = {}
        for file in _files(path, problems):
            name = file.relative_to(path).as_posix()
            key, suffix = os.path.splitext(name)
            if suffix.lower() not in {*IMAGE_SUFFIXES, *_CAPTIONS} and file.name != _METADATA:
                continue
            status = _status(file)
            if status is None:
                problems.setdefault(NO_FILE, []).append(name)
                continue
            if file.name == _METADATA:
                listed |= _listed_captions(file, file.parent.relative_to(path), problems)
            elif suffix.lower() in _CAPTIONS:
                if key not in captions or suffix.lower() == _CAPTIONS[0]:
                    captions[key] = (name, file)
            else:
                images.append((key, name, file))
            seen.append((name, status.st_size, status.st_mtime_ns))
        self._samples, left_out = pair_files(images, listed | captions)
        self.left_out = merge_left_out((problems, left_out))
        self.identity = content_key(*seen)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, place: int) -> str:
        return self._samples[place][0]

    def read(self, place: int) -> tuple[bytes, str]:
        _, image, caption = self._samples[place]
        return image.read_bytes(), caption if isinstance(caption, str) else caption_text(caption.read_bytes())


def _listed_captions(file: Path, folder: Path, problems: LeftOut) -> dict[str, tuple[str, Path | str]]:
    """Return the captions of a metadata.jsonl, as `datasets` reads it, by key. Bad lines are added to `problems`."""
    captions: dict[str, tuple[str, Path | str]] = {}
    name = (folder / file.name).as_posix()
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = read_json(line)
            image = (folder / fields["file_name"]).as_posix()
            caption = caption_of_fields(fields, CAPTION_NAMES, image)
        except (ValueError, KeyError, TypeError, UnusableSample):
            problems.setdefault(NO_CAPTION, []).append(f"{name} line {number}")
            continue
        captions[os.path.splitext(image)[0]] = (f"{name} line {number}", caption)
    return captions


def _status(file: Path) -> os.stat_result | None:
    """Return the status of a file; None for a link to nowhere, and for a pipe or device, which may never end."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _files(root: Path, problems: LeftOut) -> Iterator[Path]:
    """Yield the files below a folder: each folder's own by name, then its folders'. Links that lead back are not followed.

    Folders that cannot be read are added to `problems`.
    """

    def walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in above:
            return
        try:
            entries = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
        except OSError:
            problems.setdefault(FOLDER_UNREADABLE, []).append(folder.relative_to(root).as_posix())
            return
        folders = [name for name in entries if (folder / name).is_dir()]
        yield from (folder / name for name in entries if name not in set(folders))
        for name in folders:
            if name not in _OF_SYSTEMS:
                yield from walk(folder / name, above | {real})

    return walk(root, frozenset())

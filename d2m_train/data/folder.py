"""Image folders: image files, and captions in .txt files of the same name beside them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .. import UserError
from .samples import FOLDER_UNREADABLE, IMAGE_SUFFIXES, NO_FILE, LeftOut, caption_text, merge_left_out, pair_files
from .store import content_key

_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # not the user's


class FolderSamples:
    """All images below a folder, ordered by name; hidden files and folders, and those of operating systems, are skipped."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: {'a file' if path.exists() else 'there is no such folder'}; expected a folder.")
        self.expected = (
            f"images ({' '.join(sorted(IMAGE_SUFFIXES))}) below {path}, each with a .txt of the same name beside it"
        )
        images, captions, seen = [], {}, []
        problems: LeftOut = {}
        for file in _files(path, problems):
            name = file.relative_to(path).as_posix()
            key, suffix = os.path.splitext(name)
            if suffix.lower() not in {*IMAGE_SUFFIXES, ".txt"}:
                continue
            status = _status(file)
            if status is None:
                problems.setdefault(NO_FILE, []).append(name)
                continue
            if suffix.lower() == ".txt":
                captions[key] = (name, file)
            else:
                images.append((key, name, file))
            seen.append((name, status.st_size, status.st_mtime_ns))
        self._samples, left_out = pair_files(images, captions)
        self.left_out = merge_left_out((problems, left_out))
        self.identity = content_key(*seen)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, place: int) -> str:
        return self._samples[place][0]

    def read(self, place: int) -> tuple[bytes, str]:
        _, image, caption = self._samples[place]
        return image.read_bytes(), caption_text(caption.read_bytes())


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

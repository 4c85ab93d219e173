"""Image folders: image files, and captions in .txt files of the same name beside them."""

from __future__ import annotations

import os
from pathlib import Path

from .. import UserError
from .samples import IMAGE_SUFFIXES, caption_text, pair_files
from .store import content_key


class FolderSamples:
    """All images below a folder, ordered by name; hidden files and folders are skipped."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path}: {'a file' if path.exists() else 'there is no such folder'}; expected a folder.")
        self.expected = (
            f"images ({' '.join(sorted(IMAGE_SUFFIXES))}) below {path}, each with a .txt of the same name beside it"
        )
        images, captions, seen = [], {}, []
        for file in _files(path):
            name = file.relative_to(path).as_posix()
            key, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                images.append((key, name, file))
            elif suffix.lower() == ".txt":
                captions[key] = (name, file)
            else:
                continue
            status = file.stat()
            seen.append((name, status.st_size, status.st_mtime_ns))
        self._samples, self.left_out = pair_files(images, captions)
        self.identity = content_key(*seen)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, place: int) -> str:
        return self._samples[place][0]

    def read(self, place: int) -> tuple[bytes, str]:
        _, image, caption = self._samples[place]
        return image.read_bytes(), caption_text(caption.read_bytes())


def _files(path: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
    return found

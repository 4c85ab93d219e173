"""Text files and paths as people have them: captions, prompts and run files, whichever program wrote them."""

from __future__ import annotations

import codecs
from pathlib import Path

from . import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(data: bytes) -> str:
    """Decode text: as its byte order mark says, else UTF-8, else Windows' Latin-1, in which every byte is a character.

    Raises ValueError for bytes that are no text: a NUL, or half of a character beside a byte order mark.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding)
            except UnicodeDecodeError:
                raise ValueError(f"it begins as {encoding} and is not") from None
    if b"\0" in data:
        raise ValueError("it is not text")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace").replace("\ufffd", "")


def read_text(path: Path) -> str:
    """Read a text file. Raises OSError, and UserError for a file that is no text."""
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as text: {error}.") from None


def expand_home(path: Path) -> Path:
    """Return a path with its `~` or `~user` expanded, if there is such a user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path

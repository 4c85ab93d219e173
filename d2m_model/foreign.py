"""Text and JSON that anybody may have written: headers of files, metadata of images, bodies of requests."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

_MAX_DEPTH = 32  # of objects and lists within each other; what this project writes has 6
_MAX_DIGITS = 19  # of a whole number; those of 64 bits have no more


class MessageError(ValueError):
    """An error whose message may quote foreign text: what cannot be printed is escaped.

    A lone surrogate in a message makes ComfyUI's logging raise, and its queue stops for good. Control characters act on
    the terminal that shows them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return `text` with escapes, as in a Python string, for what cannot be printed. Line breaks stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def read_json(text: str | bytes) -> Any:
    """Parse JSON of any origin. Raises ValueError, which says what is wrong, also for what Python's json lets pass.

    That is: a key twice in an object, NaN and infinity, whole numbers beyond 64 bits, lone surrogates, nesting so deep
    that Python cannot write it again.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        data = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
        _check_value(data, 0)
    except UnicodeError:
        raise ValueError("it is not UTF-8, or has half of a surrogate pair") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return data


_TOO_DEEP = f"its objects and lists are nested more than {_MAX_DEPTH} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice[:100]!r} twice")
    return data


def _whole_number(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"it has a whole number of {len(text.lstrip('-'))} digits")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it has the number {text[:20]}, which is beyond what a computer holds")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is no number of JSON")


def _check_value(value: Any, depth: int) -> None:
    if isinstance(value, str):
        value.encode()  # raises UnicodeEncodeError for a lone surrogate
    elif isinstance(value, dict | list):
        if depth == _MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        for item in value:
            _check_value(item, depth + 1)
        for item in value.values() if isinstance(value, dict) else ():
            _check_value(item, depth + 1)

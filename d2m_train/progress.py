"""Progress of long work: a bar on a terminal, a line every half minute in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG_INTERVAL = 30  # seconds
_LOG_LINE = "{desc}: {percentage:.0f} %, {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A tqdm with these options on standard error. Where that is no terminal, it prints lines instead of a bar."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    lines: Any = _Lines(sys.stderr)
    return tqdm(iterable, file=lines, mininterval=_LOG_INTERVAL, miniters=1, bar_format=_LOG_LINE, **options)


@contextmanager
def sample_progress(description: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is called with the number of finished samples and the total, and shows them from then on."""
    bar: tqdm | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = progress_bar(desc=description, total=total, unit="sample", disable=not shown)
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


class _Lines:
    """A stream for tqdm, which redraws a bar in place: turns each drawing into a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:  # the last drawing is repeated when a bar closes
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""Bounds on what a piece of work may take: time and memory; and where an error was raised."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tools.host import ROOT

OURS = tuple(f"{ROOT / wing}/" for wing in ("d2m_model", "d2m_train", "nodes"))


class Fault(Exception):
    """Something that must not happen; the message says how to repeat it."""


class Hang(BaseException):
    """Work took too long. No `except Exception` catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in the work that takes longer. Python's code alone is interrupted."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Peak:
    """Largest growth of this process's memory since the start, in bytes (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._before = memory("VmRSS")

    def growth(self) -> int:
        return memory("VmHWM") - self._before


def memory(field: str, process: int | str = "self") -> int:
    """Return a field of /proc/PROCESS/status, in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert match is not None, field
    return 1024 * int(match[1])


def raised_by_us(error: BaseException) -> bool:
    """Return whether the innermost code that is this project's or ComfyUI's is this project's."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    known = [name for name in frames if name.startswith(OURS) or "/comfy" in name or "/ComfyUI" in name]
    return bool(known) and known[-1].startswith(OURS)

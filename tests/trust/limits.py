"""Bounds on what a piece of work may take: time and memory; and where an error was raised."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from types import FrameType

from tools.host import ROOT

_OURS = re.compile(
    rf"({re.escape(str(ROOT))}|.*/custom_nodes/[^/]+)/(d2m_model|d2m_train|nodes)/"
)  # also as ComfyUI links it
_HOST = re.compile(r"(?!.*/site-packages/).*/(ComfyUI(?!-Dense2MoE)|comfy)")


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


def growth(resident: Sequence[int], allowance: int) -> dict[str, float]:
    """Return the mean memory in the first third of the last four fifths of a run, and its growth until the last third.

    `resident` is the memory at regular moments. Raises Fault for more than 2 % and `allowance` bytes.
    """
    flat = resident[len(resident) // 5 :]
    third = max(1, len(flat) // 3)
    first, last = mean(flat[:third]), mean(flat[-third:])
    if last - first > 0.02 * first + allowance:
        raise Fault(f"memory grew from {first:,.0f} to {last:,.0f} bytes over the last four fifths")
    return {"memory_bytes": round(first), "memory_growth": round(last / first - 1, 4)}


def raised_by_us(error: BaseException) -> bool:
    """Return whether the innermost code that is this project's or ComfyUI's is this project's."""
    return ours([frame.filename for frame in traceback.extract_tb(error.__traceback__)]) is not None


def ours(files: Sequence[str]) -> int | None:
    """Return the place of the innermost frame of the pack in a traceback's files; None if one of ComfyUI is within it."""
    for place in reversed(range(len(files))):
        if _OURS.match(files[place]):
            return place
        if _HOST.match(files[place]):
            return None
    return None

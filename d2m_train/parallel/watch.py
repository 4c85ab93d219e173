"""A watch over the processes of a run: one that was killed or has frozen ends the others within a minute.

Without it they wait in a collective for as long as the main process may take to convert and encode, which is hours. A thread
of each process counts in torch's rendezvous store and reads the others' counts, and a second one ends this process when a
count stands still. Both run while the process computes: torch gives Python's lock back in its long calls.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

SILENCE = "D2M_RANK_SILENCE"  # environment variable, in seconds
_SILENCE = 45.0
_BEATS = 15  # in that time
_LAST_BEAT = 5.0  # seconds that `close` waits for a beat under way: the store may not answer
_FAILED, _ENDED = "failed", "ended"  # in place of a count
_STATUS = 1  # of a process that is ended for another's sake


class RankWatch:
    """Watches all processes of a run from one of them, until `close`."""

    def __init__(self, rank: int, count: int, wait: Callable[[], None]) -> None:
        """`wait` returns when all processes have called it. The store is where MASTER_ADDR and MASTER_PORT say."""
        from torch.distributed import TCPStore

        self.rank, self.count = rank, count
        self.silence = float(os.environ.get(SILENCE, _SILENCE))
        self.interval = self.silence / _BEATS
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        host, port = self.place.rsplit(":", 1)
        # A connection of its own: that of the process group is held by whoever waits in it.
        self._store: Any = TCPStore(host, int(port), timeout=timedelta(seconds=self.silence), wait_for_workers=False)
        self._store.set(self._key(rank), "0")
        wait()
        self._closing = threading.Event()
        self._read = ["0"] * count
        self._restart(time.monotonic())
        self._beating = threading.Thread(target=self._beat, name="rank beats", daemon=True)
        self._beating.start()
        threading.Thread(target=self._look, name="rank watch", daemon=True).start()

    def close(self, *, failed: bool) -> None:
        """Stop watching. `failed`: this process ends by an error, which the others then name."""
        self._closing.set()
        self._beating.join(_LAST_BEAT)
        if not self._beating.is_alive():  # it would hold the connection while the store does not answer
            with suppress(RuntimeError):  # the store has ended with its process
                self._store.set(self._key(self.rank), _FAILED if failed else _ENDED)

    def _key(self, rank: int) -> str:
        return f"d2m_train/beat/{rank}"

    def _restart(self, now: float) -> None:
        self._looked = self._answered = now
        self._heard = [now] * self.count

    def _beat(self) -> None:
        """Count, and note whose count has changed. The store's calls block while the process that has it is frozen."""
        keys = [self._key(rank) for rank in range(self.count)]
        beat = 0
        while not self._closing.wait(self.interval):
            beat += 1
            try:
                self._store.set(self._key(self.rank), str(beat))
                read = [value.decode() for value in self._store.multi_get(keys)]
            except RuntimeError:  # no connection
                continue
            now = time.monotonic()
            self._answered = now
            self._heard = [
                now if new == _ENDED or new not in (old, _FAILED) else heard
                for new, old, heard in zip(read, self._read, self._heard, strict=True)
            ]
            self._read = read

    def _look(self) -> None:
        """End this process once another has been silent for too long."""
        while not self._closing.wait(self.interval):
            self._check(time.monotonic())

    def _check(self, now: float) -> None:
        if now - self._looked > 3 * self.interval:  # this process was frozen itself, and perhaps all of them were
            self._restart(now)
        self._looked = now
        if (problem := self._problem(now)) and not self._closing.is_set():
            self._end(problem)

    def _problem(self, now: float) -> str | None:
        """Say which process is silent; None where all are well."""
        if now - self._answered > self.silence:
            return (
                f"The store at {self.place}, which process 0 or its launcher has, has not answered for "
                f"{now - self._answered:.0f} s: that process was killed, has frozen, or its machine cannot be reached."
            )
        for rank, heard in enumerate(self._heard):
            if rank != self.rank and now - heard > self.silence:
                if self._read[rank] == _FAILED:
                    return f"Process {rank} of {self.count} (counted from 0) ended by an error, which it has printed."
                return (
                    f"Process {rank} of {self.count} (counted from 0) has given no sign of life for {now - heard:.0f} s: "
                    "it was killed, has frozen, or its machine cannot be reached."
                )
        return None

    def _end(self, problem: str) -> None:
        """End this process at once: its main thread may wait for the other for ever."""
        print(
            f"error: {problem} Process {self.rank} ends; the run goes on from its last checkpoint with resume=latest.",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_STATUS)

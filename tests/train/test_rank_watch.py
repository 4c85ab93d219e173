"""Processes of a run that are killed, freeze or fail: the others end soon, and say why."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from d2m_train.parallel.watch import SILENCE, RankWatch
from tests.toys.runs import DDP, run_file, write_inputs
from tests.toys.trainer_process import Run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_inputs(folder)
    return folder


def begun(inputs: Path, name: str) -> Run:
    """A run of two processes without a launcher: process 0 has the store, and converts while the other waits."""
    run = Run(
        ["distill", str(run_file(inputs)), f"output_dir={inputs / name}"], 2, DDP | {SILENCE: "1", "TQDM_DISABLE": "1"}
    )
    while not (inputs / name / "run.yaml").exists():
        assert run.poll() is None, "it ended before it began"
        time.sleep(0.02)
    return run


def test_a_frozen_process_ends_those_that_wait_for_it(inputs: Path) -> None:
    run = begun(inputs, "frozen")
    run.send_signal(signal.SIGSTOP, rank=0)
    result = run.wait()
    assert result.returncode == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert "which process 0 or its launcher has, has not answered for" in line
    assert "Process 1 ends; the run goes on from its last checkpoint with resume=latest." in line


def test_a_killed_process_ends_those_that_wait_for_it(inputs: Path) -> None:
    run = begun(inputs, "killed")
    run.send_signal(signal.SIGKILL, rank=0)
    result = run.wait(without=0)
    assert result.returncode == 2
    assert "error: Process 1 has lost the connection to another one" in result.output
    assert "Traceback" not in result.output


# Both processes in this one, on a store of their own


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RankWatch, RankWatch, list[str], threading.Event]]:
    """The watches of process 0 and 1, what makes them end their process, and an event that is set then."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv(SILENCE, "0.6")
    problems: list[str] = []
    ended = threading.Event()

    def end(self: RankWatch, problem: str) -> None:
        problems.append(problem)
        ended.set()
        self.close(failed=True)

    monkeypatch.setattr(RankWatch, "_end", end)
    barrier = threading.Barrier(2)
    one: list[RankWatch] = []
    other = threading.Thread(target=lambda: one.append(RankWatch(1, 2, barrier.wait)))
    other.start()
    zero = RankWatch(0, 2, barrier.wait)
    other.join()
    yield zero, one[0], problems, ended
    for watch in (zero, one[0]):
        watch.close(failed=False)


Pair = tuple[RankWatch, RankWatch, list[str], threading.Event]


def test_a_process_that_failed_is_named_as_such(pair: Pair) -> None:
    _, one, problems, ended = pair
    one.close(failed=True)
    assert ended.wait(30)
    assert problems == ["Process 1 of 2 (counted from 0) ended by an error, which it has printed."]


def test_a_process_that_beats_or_has_come_to_its_end_is_no_dead_one(pair: Pair) -> None:
    _, one, problems, ended = pair
    assert not ended.wait(0.9)
    one.close(failed=False)
    assert not ended.wait(0.9), problems


def test_a_run_that_was_frozen_as_a_whole_goes_on(pair: Pair) -> None:
    """Ctrl-Z and fg: all counts are old when the first process wakes."""
    zero, _, problems, _ = pair
    zero.close(failed=False)
    zero._closing.clear()  # without its threads
    now = time.monotonic()
    zero._looked = now + 3600 - zero.interval
    zero._check(now + 3600)
    assert ["has not answered for 3600 s" in problem for problem in problems] == [True], "it was not frozen itself"
    zero._looked = now
    zero._check(now + 3600)
    assert len(problems) == 1

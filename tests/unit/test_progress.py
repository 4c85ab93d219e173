"""The progress of long work, on a terminal and in a log file."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from functools import partial

import pytest
import tqdm

from d2m_train.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show bars, whatever TQDM_DISABLE said when tqdm was imported."""
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm.tqdm, disable=False))


def work(stream: io.StringIO) -> str:
    with redirect_stderr(stream), progress_bar(total=200, desc="Calibration", unit="batch") as bar:
        for _ in range(200):
            bar.update()
    return stream.getvalue()


def test_a_log_file_gets_few_lines_and_no_bar() -> None:
    first, last = work(io.StringIO()).splitlines()
    assert first.startswith("Calibration: 0 %, 0/200 batch")
    assert last.startswith("Calibration: 100 %, 200/200 batch")


def test_a_terminal_gets_a_bar_that_is_drawn_in_place() -> None:
    text = work(Terminal())
    assert text.count("\n") == 1
    assert "\rCalibration: 100%|" in text


def test_a_loop_can_be_watched() -> None:
    with redirect_stderr(io.StringIO()) as log:
        assert list(progress_bar(range(3), desc="prompts")) == [0, 1, 2]
    assert log.getvalue().splitlines()[-1].startswith("prompts: 100 %, 3/3")

"""A stage's checkpoints come back as they were saved, and nothing in a shared folder runs code."""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from d2m_train import UserError
from d2m_train.training.checkpoints import Checkpoints
from d2m_train.training.run_lock import locked_folder

STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {
        "state": {"step": torch.tensor(3)},
        "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": ["w"]}],
    },
}
EMPTY = {
    "model": {"weight": torch.zeros(2, 3), "half": torch.zeros(2, dtype=torch.bfloat16)},
    "optimizer": {"state": {"step": torch.tensor(0)}, "param_groups": [{"lr": 0.0, "betas": (0.0, 0.0), "params": []}]},
}


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", {"seed": 0}, keep=2, main=True, wait=lambda: None)


def empty() -> dict[str, Any]:
    return pickle.loads(pickle.dumps(EMPTY))


def test_a_checkpoint_that_a_kill_left_half_deleted_has_no_checkpoints_name(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **options: Any) -> None:
        if path.is_dir():
            next(iter(path.iterdir())).unlink()
            raise KeyboardInterrupt

    checkpoints.save(1, STATE, {})
    checkpoints.save(2, STATE, {})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(3, STATE, {})
    assert checkpoints.steps() == [2, 3]
    checkpoints.clean()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000002", "step-000003"]


def test_what_was_saved_is_read_again(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, STATE, {"note": 1})
    state = empty()
    assert checkpoints.load(5, state) == {"note": 1}
    assert state["optimizer"] == STATE["optimizer"]
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in STATE["model"].items())


@pytest.mark.parametrize("where", ["metadata", "value"])
def test_code_in_a_checkpoint_is_not_run(checkpoints: Checkpoints, tmp_path: Path, where: str) -> None:
    state: dict[str, Any] = empty()
    if where == "value":
        state["optimizer"]["param_groups"][0]["lr"] = Touch(tmp_path / "ran")
    checkpoints.save(5, state, {})
    if where == "metadata":
        (checkpoints.path(5) / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"step-000005: the checkpoint cannot be read .*delete step-000005"):
        checkpoints.load(5, empty())
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_reads_no_file_elsewhere(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, STATE, {})
    file = checkpoints.path(5) / ".metadata"
    metadata = dcp.FileSystemReader(checkpoints.path(5)).read_metadata()
    for stored in metadata.storage_data.values():
        stored.relative_path = f"../{stored.relative_path}"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="names a file elsewhere"):
        checkpoints.load(5, empty())


def test_two_runs_in_one_folder_exclude_each_other(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "out"):
        held = rf"out: process {os.getpid()} on {re.escape(socket.gethostname())} is running this run"
        with pytest.raises(UserError, match=held), locked_folder(tmp_path / "out"):
            pass
    with locked_folder(tmp_path / "out"):
        pass

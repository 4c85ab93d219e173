"""A stage's checkpoints: complete or absent, the last few kept, readable by another number of processes.

`checkpoints/step-000500/` holds torch.distributed.checkpoint's shards and `checkpoint.json`: the step and the identity of
the run. While a checkpoint is being written or deleted, its name ends in `.partial`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed import is_initialized
from torch.distributed.checkpoint.api import CheckpointException

from d2m_model.atomic import sync_folder
from d2m_model.foreign import read_json

from .. import UserError
from .checkpoint_reader import CheckpointPlanner, CheckpointReader

_MANIFEST = "checkpoint.json"
_PARTIAL = ".partial"
# What torch and pickle raise for damaged files. LookupError, TypeError and AttributeError: for metadata of other types.
_UNREADABLE = (
    *(OSError, CheckpointException, RuntimeError, ValueError, EOFError, UnpicklingError),
    *(LookupError, TypeError, AttributeError, AssertionError),
)


class Checkpoints:
    """The checkpoints of one folder.

    `identity` identifies the run (a flat mapping of JSON values); checkpoints of another run are refused. `main` is true
    on the one rank that renames and deletes; `wait` is a barrier. All methods except `steps` are called on every rank.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], *, keep: int, main: bool, wait: Callable[[], object]
    ) -> None:
        self.folder, self.identity, self.keep, self.main, self.wait = folder, dict(identity), keep, main, wait
        self.hints: dict[str, Callable[[Any], str]] = {}  # by key of `identity`: advice, given the stored value
        self.free: Container[str] = ()  # keys of `identity` that may have changed

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        matches = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in matches if match and (self.folder / match[0] / _MANIFEST).is_file())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def save(self, step: int, state: dict[str, Any], extra: Mapping[str, Any]) -> None:
        """Write `state` (tensors, sharded or not) and `extra` (JSON), then delete all but the last `keep` checkpoints.

        Raises UserError if writing fails; the last good checkpoint stays as it was.
        """
        final = self.path(step)
        partial = final.with_name(final.name + _PARTIAL)
        try:
            if self.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
            self.wait()
            with _quiet():
                dcp.save(
                    state, storage_writer=dcp.FileSystemWriter(partial, sync_files=True), no_dist=not is_initialized()
                )
            if self.main:
                manifest = {"step": step, "identity": self.identity, "extra": dict(extra)}
                with (partial / _MANIFEST).open("w") as file:
                    json.dump(manifest, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                _remove(final)  # left by an earlier attempt
                os.rename(partial, final)
                with contextlib.suppress(OSError):  # a file system that cannot sync folders
                    sync_folder(self.folder)
        except (OSError, CheckpointException) as error:
            if self.main:
                shutil.rmtree(partial, ignore_errors=True)
            good = self.steps()
            last = f"the last good one is {self.path(good[-1])}" if good else "there is none before it"
            raise UserError(
                f"{final}: the checkpoint cannot be written ({_reason(error)}); {last}. "
                "Make room, and go on with resume=latest."
            ) from None
        self.wait()
        if self.main:
            for old_step in self.steps()[: -self.keep]:
                _remove(self.path(old_step))

    def manifest(self, step: int) -> dict[str, Any]:
        """Read a checkpoint's manifest. Raises UserError if the checkpoint is of another run, and names what differs."""
        path = self.path(step)
        try:
            manifest: dict[str, Any] = read_json((path / _MANIFEST).read_bytes())
            stored = dict(manifest["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: {_MANIFEST} cannot be read ({error}); {_older(path)}") from None
        differs = sorted(
            key
            for key in {**stored, **self.identity}
            if stored.get(key) != self.identity.get(key, None) and key not in self.free
        )
        if differs:
            listed = "; ".join(f"{key} was {stored.get(key)!r}, is {self.identity.get(key)!r}" for key in differs)
            hints = "".join(f" {self.hints[key](stored.get(key))}" for key in differs if key in self.hints)
            raise UserError(
                f"{path} is of another run: {listed}. Give what it was made with, or another output_dir for a new run."
                f"{hints}"
            )
        return manifest

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """Fill `state` in place, and return the `extra` that was saved with it. Raises UserError for a damaged checkpoint."""
        manifest = self.manifest(step)
        try:
            if state:
                reader = CheckpointReader(self.path(step))
                reader.read_metadata()  # torch reads it again, and of any error says only that there is none
                with _quiet():
                    dcp.load(
                        state,
                        storage_reader=reader,
                        planner=CheckpointPlanner(),
                        no_dist=not is_initialized(),
                    )
        except _UNREADABLE as error:
            raise UserError(
                f"{self.path(step)}: the checkpoint cannot be read ({_reason(error)}); {_older(self.path(step))}"
            ) from None
        extra: dict[str, Any] = manifest["extra"]
        return extra

    def clean(self) -> None:
        """Remove what a run that was killed while writing or deleting has left behind."""
        if self.main:
            for partial in self.folder.glob(f"*{_PARTIAL}"):
                shutil.rmtree(partial, ignore_errors=True)
        self.wait()


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, if it exists. Half of one never has a checkpoint's name."""
    partial = checkpoint.with_name(f"{checkpoint.name}.old{_PARTIAL}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(checkpoint, partial)
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning that there is no process group: a single process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _older(path: Path) -> str:
    return f"delete {path.name} to go on at the checkpoint before it, or begin the stage anew with restart=STAGE."


def _reason(error: BaseException) -> str:
    """Return the error in one line; of failures on several ranks, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))[0]
        return _reason(failure)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__

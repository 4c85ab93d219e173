"""Which run it is: what has to be the same for a stopped run to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from d2m_model.atomic import atomic_file
from d2m_model.teacher import open_teacher

from .. import UserError
from ..data.batch import DataSource
from ..run_config import STAGES, RunConfig, Stage

# What a run may change when it goes on: where it, its teacher and its data are (they are compared by content), what it shows
# and keeps, which stages it runs, and how a global batch is gathered (loop.py compares how many microbatches it has).
FREE = (
    "output_dir",
    "resume",
    "restart",
    "stages",
    "checkpoints.",
    "eyes.",
    "export.",
    "data.cache",
    "data.path",
    "data.text_encoders",
    "data.vae",
    "teacher.path",
    "teacher.offload",
    "training.accumulation",
    "training.gradient_checkpointing",
    "training.compile",
)
SLICES, SLICE = 8192, 1 << 12  # of a teacher's file, in bytes: all of 32 MB, and of 24 GB a page every 3 MB


def run_identity(run: RunConfig, teacher: Path, data: DataSource) -> dict[str, Any]:
    """Flat, of JSON values: every field that training depends on, what the teacher is, and what the data are."""
    with open_teacher(teacher) as opened:
        fingerprint = _fingerprint(opened.files)
    return {**_bound(run.model_dump(mode="json")), "teacher.fingerprint": fingerprint, "data.identity": data.identity}


def stage_identity(identity: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """What one stage depends on: not on how the others are trained."""
    own = f"stage.{stage}."
    return {key: value for key, value in identity.items() if not key.startswith("stage.") or key.startswith(own)}


def _fingerprint(files: Sequence[Path]) -> str:
    """A digest of files' sizes and of slices all over them."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for number in range(min(SLICES, -(-size // SLICE))):
                file.seek(max(number * SLICE, (size - SLICE) * number // (SLICES - 1)))
                digest.update(file.read(SLICE))
    return digest.hexdigest()[:32]


def check_same_run(run: RunConfig, stored: Path) -> None:
    """Raises UserError if output_dir holds a run that this one does not go on with, and says what differs."""
    if run.resume != "latest" and run.restart is None:
        raise UserError(
            f"{stored.parent} holds a run already. Go on with it by resume=latest, or name another output_dir."
        )
    try:
        before = _bound(yaml.safe_load(stored.read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{stored}: cannot be read ({error}); name another output_dir.") from None
    now = _bound(run.model_dump(mode="json"))
    anew = STAGES[STAGES.index(run.restart) :] if run.restart else ()
    begun = tuple(f"stage.{stage}." for stage in STAGES if stage not in anew and (stored.parent / stage).is_dir())
    differs = [
        f"{key} was {before.get(key)!r}, is {now[key]!r}"
        for key in now
        if before.get(key) != now[key] and (not key.startswith("stage.") or key.startswith(begun))
    ]
    if differs:
        raise UserError(
            f"{stored.parent} holds another run: {'; '.join(differs)}. "
            "Give what it was made with, or another output_dir for a new run."
        )


def check_same_sources(identity: dict[str, Any], stored: Path) -> None:
    """Keep what the teacher and the data are, for stages that begin later. Raises UserError if they were others before."""
    now = {key: identity[key] for key in ("teacher.fingerprint", "data.identity")}
    try:
        before = json.loads(stored.read_text()) if stored.exists() else now
    except (OSError, ValueError) as error:
        raise UserError(f"{stored}: cannot be read ({error}); name another output_dir.") from None
    if differs := [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value
    ]:
        raise UserError(
            f"{stored.parent} was begun with another teacher or other data: {'; '.join(differs)}. "
            "Give those, or another output_dir for a new run."
        )
    with atomic_file(stored) as part:
        part.write_text(json.dumps(now, indent=1) + "\n")


def _bound(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flat(fields).items() if not key.startswith(FREE)}


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found

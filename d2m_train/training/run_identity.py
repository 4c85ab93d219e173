"""The identity of a run: all that must stay the same for a stopped run to resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2m_model.atomic import atomic_file
from d2m_model.foreign import read_json
from d2m_model.teacher import open_teacher

from .. import UserError
from ..data.batch import DataSource
from ..data.pictures import PictureSource
from ..fingerprint import fingerprint
from ..run_config import STAGES, RunConfig, Stage
from ..run_file import parse_yaml
from ..text_file import read_text
from .changed_steps import changeable

# Fields that a run may change when it resumes: where it, its teacher and its data are (teacher and data are compared by
# content), what it logs and keeps, which stages it runs, and how a global batch is gathered (end_to_end.py compares the number
# of microbatches).
_LISTING = "data.listing"  # among the sources of a run: under which key the cache has the records of its samples
_FREE = (
    "output_dir",
    "resume",
    "restart",
    "stages",
    "checkpoints.",
    "eyes.",
    "export.",
    "data.cache",
    "data.held_out",
    "data.path",
    "data.text_encoders",
    "data.vae",
    "teacher.path",
    "teacher.offload",
    "training.accumulation",
    "training.gradient_checkpointing",
    "training.compile",
)


def run_identity(run: RunConfig, teacher: Path, data: DataSource) -> dict[str, Any]:
    """Return a flat mapping of JSON values: all fields that training depends on, and digests of teacher and data."""
    with open_teacher(teacher) as opened:
        teacher_identity = fingerprint(opened.files)
    fields = _bound(run.model_dump(mode="json"))
    return {**fields, "teacher.fingerprint": teacher_identity, "data.identity": data.identity}


def stage_identity(identity: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return the identity of one stage, without the fields of the other stages."""
    own = f"stage.{stage}."
    return {key: value for key, value in identity.items() if not key.startswith("stage.") or key.startswith(own)}


def check_same_run(run: RunConfig, stored: Path) -> None:
    """Raise UserError, with the differences, if output_dir holds a run that this one does not continue."""
    if not _begun(stored.parent):
        return  # nothing depends on what a first start had, which failed
    if run.resume == "never" and run.restart is None:
        raise UserError(
            f"{stored.parent} holds a run already. Go on with it by resume=latest, or name another output_dir."
        )
    try:
        before = _bound(parse_yaml(read_text(stored)))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{stored}: cannot be read ({error}); name another output_dir.") from None
    now = _bound(run.model_dump(mode="json"))
    free = [key for stage in STAGES for key in changeable(stage)]
    restarted = STAGES[STAGES.index(run.restart) :] if run.restart else ()
    begun = tuple(f"stage.{stage}." for stage in STAGES if stage not in restarted and (stored.parent / stage).is_dir())
    differs = [
        f"{key} was {before.get(key)!r}, is {now[key]!r}"
        for key in now
        if before.get(key) != now[key]
        and (not key.startswith("stage.") or key.startswith(begun))
        and not (run.resume == "changed" and key in free)
    ]
    if differs:
        asked = any(difference.startswith(tuple(free)) for difference in differs)
        raise UserError(
            f"{stored.parent} holds another run: {'; '.join(differs)}. Give what it was made with, or another output_dir "
            f"for a new run.{' Steps and learning rates may change with resume=changed.' if asked else ''}"
        )


def _begun(folder: Path) -> bool:
    """Return whether a stage has written anything: a calibration, a checkpoint or a student."""
    return any(path.is_file() for stage in STAGES for path in (folder / stage).rglob("*"))


def check_same_sources(identity: dict[str, Any], data: DataSource, stored: Path) -> None:
    """Store the identity of teacher and data for later stages. Raises UserError if they differ from those stored before."""
    now = {key: identity[key] for key in ("teacher.fingerprint", "data.identity")}
    try:
        before = read_json(stored.read_bytes()) if stored.exists() and _begun(stored.parent) else now
        if not isinstance(before, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{stored}: cannot be read ({error}); name another output_dir.") from None
    if differs := [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value
    ]:
        raise UserError(
            f"{stored.parent} was begun with another teacher or other data: {'; '.join(differs)}. "
            f"Give those, or another output_dir for a new run.{_data_changes(data, before)}"
        )
    if isinstance(data, PictureSource):
        now[_LISTING] = data.listing
    with atomic_file(stored) as part:
        part.write_text(json.dumps(now, indent=1) + "\n")


def _data_changes(data: DataSource, before: dict[str, Any]) -> str:
    """Name the samples that differ, where that is known."""
    if not isinstance(data, PictureSource) or not isinstance(before.get(_LISTING), str):
        return ""
    return f" {data.changes_since(before[_LISTING])}"


def _bound(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flat(fields).items() if not key.startswith(_FREE)}


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""The identity of a run: all that must stay the same for a stopped run to resume."""

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

# Fields that a run may change when it resumes: where it, its teacher and its data are (teacher and data are compared by
# content), what it logs and keeps, which stages it runs, and how a global batch is gathered (end_to_end.py compares the number
# of microbatches).
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
_SLICES, _SLICE = 8192, 1 << 12  # number and bytes: all of a 32 MB file, and a page every 3 MB of a 24 GB file


def run_identity(run: RunConfig, teacher: Path, data: DataSource) -> dict[str, Any]:
    """Return a flat mapping of JSON values: all fields that training depends on, and digests of teacher and data."""
    with open_teacher(teacher) as opened:
        fingerprint = _fingerprint(opened.files)
    return {**_bound(run.model_dump(mode="json")), "teacher.fingerprint": fingerprint, "data.identity": data.identity}


def stage_identity(identity: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return the identity of one stage, without the fields of the other stages."""
    own = f"stage.{stage}."
    return {key: value for key, value in identity.items() if not key.startswith("stage.") or key.startswith(own)}


def _fingerprint(files: Sequence[Path]) -> str:
    """Digest the sizes of files and slices spread over them."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for number in range(min(_SLICES, -(-size // _SLICE))):
                file.seek(max(number * _SLICE, (size - _SLICE) * number // (_SLICES - 1)))
                digest.update(file.read(_SLICE))
    return digest.hexdigest()[:32]


def check_same_run(run: RunConfig, stored: Path) -> None:
    """Raise UserError, with the differences, if output_dir holds a run that this one does not continue."""
    if run.resume != "latest" and run.restart is None:
        raise UserError(
            f"{stored.parent} holds a run already. Go on with it by resume=latest, or name another output_dir."
        )
    try:
        before = _bound(yaml.safe_load(stored.read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{stored}: cannot be read ({error}); name another output_dir.") from None
    now = _bound(run.model_dump(mode="json"))
    restarted = STAGES[STAGES.index(run.restart) :] if run.restart else ()
    begun = tuple(f"stage.{stage}." for stage in STAGES if stage not in restarted and (stored.parent / stage).is_dir())
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
    """Store the identity of teacher and data for later stages. Raises UserError if they differ from those stored before."""
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
    return {key: value for key, value in _flat(fields).items() if not key.startswith(_FREE)}


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

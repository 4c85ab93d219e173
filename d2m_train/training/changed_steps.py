"""Going on with a stage at other steps or another learning rate, when the run asks for it by resume=changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import UserError
from ..run_config import STAGES, RunConfig, Stage, StageSection, TrainingSection
from .checkpoints import Checkpoints
from .optimizers import scheduled_rate


def changeable(stage: Stage) -> tuple[str, ...]:
    """Return the fields of a stage that resume=changed may change, by dotted name."""
    return f"stage.{stage}.steps", f"stage.{stage}.learning_rate"


def reopen_stage(run: RunConfig, stage: Stage) -> bool:
    """Return whether a finished stage has to go on, to more steps than it has; its student is then removed.

    Raises UserError if a later stage was made from its result, or if it has more steps already.
    """
    folder = run.output_dir / stage
    last = _last_step(folder / "checkpoints")
    steps = getattr(run.stage, stage).steps
    if run.resume != "changed" or last in (0, steps):
        return False
    if last > steps:
        raise UserError(f"stage.{stage}.steps is {steps}, but {folder} has {last} already; expected {last} or more.")
    for later in STAGES[STAGES.index(stage) + 1 :]:
        if (run.output_dir / later / "student.safetensors").exists() or _last_step(
            run.output_dir / later / "checkpoints"
        ):
            raise UserError(
                f"stage.{stage}.steps is {steps}, and {folder} has {last}. Stage {later} was made from them: add "
                f"restart={later}, which repeats it afterwards, or name another output_dir."
            )
    (folder / "student.safetensors").unlink()
    return True


def _last_step(checkpoints: Path) -> int:
    stored = Checkpoints(checkpoints, {}, keep=1, main=False, wait=lambda: None).steps()
    return stored[-1] if stored else 0


def schedule_text(
    stage: Stage, before: Mapping[str, Any], section: StageSection, training: TrainingSection, step: int
) -> str | None:
    """Say what a changed stage does to its schedule at `step`; None if nothing has changed. `before`: its old identity."""
    keys = changeable(stage)
    old = section.model_copy(update={"steps": before[keys[0]], "learning_rate": before[keys[1]]})
    if old == section:
        return None
    now, then = (scheduled_rate(step, part, training) for part in (section, old))
    return (
        f"{stage}: {section.steps} steps instead of {old.steps}, learning rate {section.learning_rate:g} instead of "
        f"{old.learning_rate:g}. The {training.schedule} schedule is now that of {section.steps} steps: step {step + 1} has "
        f"the learning rate {now:.3g}, where it had {then:.3g}."
    )


def stored_identity(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """Return the identity with which a checkpoint was saved."""
    return dict(checkpoints.manifest(step)["identity"])

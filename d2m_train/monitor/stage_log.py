"""The log of a stage: progress bar, TensorBoard, log.jsonl, and W&B if the run asks for it.

log.jsonl has one object a line, each with its `step`: means over an interval, measurements, and events. A stage that
resumes from a checkpoint cuts the lines after it, since they will be written again.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2m_model.atomic import atomic_file

from .. import UserError
from ..progress import progress_bar
from ..run_config import EyesSection

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"
_SHOWN = ("resumed", "stopped", "warning")  # events that are printed on the terminal too


class StageLog:
    """Logs one stage to terminal, TensorBoard, log.jsonl and W&B; does nothing off rank 0."""

    def __init__(
        self,
        folder: Path,
        tensorboard: Path,
        section: EyesSection,
        *,
        stage: str,
        steps: int,
        start: int,
        main: bool,
        run_name: str,
        describe: Callable[[SummaryWriter], None] = lambda writer: None,
    ) -> None:
        """`folder` is the stage's, `tensorboard` the run's; the stage has a subfolder there.

        `start`: the step that the stage resumes from, 0 for a new one. `describe` writes what TensorBoard shows beside the
        measurements. Raises UserError if W&B is wanted but not installed.
        """
        self.folder, self.section, self.steps, self.main = folder, section, steps, main
        self._stage = stage
        self._step, self._sums, self._tokens, self._count = start, defaultdict[str, float | Tensor](float), 0, 0
        self._begun = self._since = time.monotonic()
        self._last: dict[str, float] = {}
        self._part: dict[str, str] = {}
        self._wandb: Any = None
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._wandb = _open_wandb(folder, stage, run_name) if section.wandb else None
        folder.mkdir(parents=True, exist_ok=True)
        reached = _cut(folder / LOG_FILE, start)
        for line in read_stage_log(folder / LOG_FILE):
            self._last |= {name: value for name, value in line.items() if isinstance(value, float)}
        self._log = (folder / LOG_FILE).open("a", buffering=1)
        # TensorBoard drops what an earlier attempt wrote from this step on.
        purge = None if reached is None else start + 1 if start else 0
        self._writer = SummaryWriter(str(tensorboard / stage), purge_step=purge)
        describe(self._writer)
        self._bar = progress_bar(desc=stage, total=steps, initial=start, unit="step")
        if reached is not None:
            self.event("resumed", reached=reached)

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_part(self, kind: str, name: str) -> None:
        """Begin a part of the stage (kind: block, for example), which every following line of the log names."""
        if self.main:
            self._end_interval()
            self._part = {kind: name}
            self._bar.set_description(f"{self._stage} {name}", refresh=False)

    def step(
        self,
        step: int,
        losses: Mapping[str, float | Tensor],
        *,
        tokens: int,
        learning_rate: float,
        grad_norm: float | Tensor | None,
    ) -> None:
        """Called once per optimizer step, counted from 1. `tokens`: the number the step trained on, over all ranks.

        Scalars on a device are read when an interval ends, so that the host does not wait at each step.
        """
        self._step = step
        if not self.main:
            return
        measured = {f"loss/{name}": value for name, value in losses.items()}
        if grad_norm is not None:
            measured["grad_norm"] = grad_norm
        for name, value in measured.items():
            self._sums[name] += value.detach() if isinstance(value, Tensor) else value
        self._tokens, self._count = self._tokens + tokens, self._count + 1
        self._learning_rate = learning_rate
        self._bar.update()
        if step % self.section.log_every == 0 or step == self.steps:
            self._end_interval()

    def scalars(
        self, step: int, values: Mapping[str, float], prefix: str = "", *, uncharted: tuple[str, ...] = ()
    ) -> None:
        """Log measurements of one step to TensorBoard, log.jsonl and W&B as `prefix/name`.

        Names that begin with one of `uncharted` are left out of TensorBoard, which would have a chart for each.
        """
        if not self.main:
            return
        named = {f"{prefix}/{name}" if prefix else name: float(value) for name, value in values.items()}
        self._last |= named
        for name in values:
            if not name.startswith(uncharted):
                whole = f"{prefix}/{name}" if prefix else name
                self._writer.add_scalar(whole, named[whole], step)
        self._write({"step": step, **named})
        if self._wandb is not None:
            self._wandb.log({"step": step, **named})

    def last(self, name: str) -> float | None:
        """Return the last value of a measurement; None if there is none, and off rank 0."""
        return self._last.get(name)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.main:
            self._bar.write(f"{self._stage}, {text}", file=sys.stderr)

    def image(self, step: int, name: str, image: Image) -> Path:
        """Log an image to <stage>/<name>/step-000500.png, TensorBoard and W&B, and return the file."""
        file = self.folder / name / f"step-{step:06}.png"
        if not self.main:
            return file
        import numpy as np

        file.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(file)
        pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, name: self._wandb.Image(image)})
        return file

    def event(self, kind: str, **fields: Any) -> None:
        """Log `resumed`, `saved`, `stopped` or `warning` (with `message`), at the last step unless `step` is given."""
        if not self.main:
            return
        fields = {"event": kind, "step": self._step, **fields}
        self._write(fields)
        if kind in _SHOWN:
            text = fields.get("message") or ", ".join(
                f"{key} {value}" for key, value in fields.items() if key != "event"
            )
            self._bar.write(f"{kind}: {text}", file=sys.stderr)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within the `with` (validation, samples, checkpoints) out of tokens per second."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    @contextmanager
    def set_up(self) -> Iterator[None]:
        """Leave the time within the `with` out of tokens per second and of the bar's time left."""
        began = time.monotonic()
        try:
            with self.paused():
                yield
        finally:
            if self.main and not self._bar.disable:
                took = time.monotonic() - began
                self._bar.start_t += took
                self._bar.last_print_t += took

    def close(self) -> None:
        """Write the rest of an interval and close everything. May be called twice."""
        if not self.main or self._log.closed:
            return
        self._end_interval()
        self._bar.close()
        self._writer.close()
        self._log.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _end_interval(self) -> None:
        if self._count == 0:
            return
        now = time.monotonic()
        means = {name: value / self._count for name, value in _read(self._sums).items()}
        rate = self._tokens / max(now - self._since, 1e-9)
        shown = {name.removeprefix("loss/"): f"{value:.4g}" for name, value in means.items() if name != "grad_norm"}
        self._bar.set_postfix(shown | {"tokens/s": f"{rate:.3g}"}, refresh=False)
        means |= {"learning_rate": self._learning_rate, "tokens_per_second": rate, "mean_of_steps": self._count}
        self.scalars(self._step, means | {"seconds": now - self._begun})
        self._sums.clear()
        self._tokens, self._count, self._since = 0, 0, now

    def _write(self, fields: Mapping[str, Any]) -> None:
        # JSON has no NaN; null stands for a value that is not a finite number.
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()
        } | self._part
        self._log.write(json.dumps(plain) + "\n")


def _read(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Read numbers and scalars on a device: those in one copy, for which the host waits once."""
    scalars = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    read = torch.stack([scalar.float() for scalar in scalars.values()]).tolist() if scalars else []
    return {**values, **dict(zip(scalars, read, strict=True))}


def read_stage_log(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a log.jsonl, without a last one that a crash cut short."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _cut(log: Path, start: int) -> int | None:
    """Remove the lines after step `start`, and return the step that had been reached; None if there was no log."""
    lines = read_stage_log(log)
    if not lines and not start:
        log.unlink(missing_ok=True)
        return None
    # A stage that starts over keeps nothing, not even measurements from before its first step.
    kept = [line for line in lines if start and line["step"] <= start]
    with atomic_file(log) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return max([start, *(line["step"] for line in lines)])


def _open_wandb(folder: Path, stage: str, run_name: str) -> Any:
    """Open this stage's W&B run, the earlier one if there was one, and return the wandb module."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise UserError(
            "eyes.wandb is true, but wandb is not installed: pip install wandb, or eyes.wandb=false."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    identity = folder / "wandb-id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    wandb.init(
        project="dense2moe-flux",
        name=f"{run_name} {stage}",
        group=run_name,
        id=identity.read_text(),
        resume="allow",
        dir=str(folder),
    )
    # W&B's own step can only grow; that of a resumed run goes back.
    wandb.define_metric("step")
    wandb.define_metric("*", step_metric="step")
    return wandb

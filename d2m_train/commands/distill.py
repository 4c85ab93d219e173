"""Distil a dense FLUX.1 into a FLUX-MoE: convert, shared, experts, blocks, export, as one YAML file says (Sec. 3.2).

Every field can be overridden, as in `training.batch_size=4`. `output_dir=` is the run's folder; `resume=latest` goes on
where the run stopped, or starts it; `stages=[experts]` runs one stage, from the result of the stage before;
`restart=experts` repeats a stage and those after it. With several GPUs: `accelerate launch -m d2m_train distill RUN.yaml`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2m_model.atomic import atomic_file
from d2m_model.checkpoint import check_file
from d2m_model.config import FluxMoEConfig
from d2m_model.teacher import open_teacher

from .. import UserError
from ..blockwise.stage import check_blockwise, remove_working_files, train_blockwise
from ..conversion.run import run_conversion
from ..conversion.settings import settings_from_run
from ..data import open_source
from ..data.batch import DataSource, check_fits
from ..distillation.stages import TRAINING, trainable_stages
from ..parallel.ranks import Ranks
from ..progress import sample_progress
from ..run_config import STAGES, RunConfig, Stage
from ..run_file import fields_text, load_run
from ..teacher.frozen import open_frozen_teacher
from ..teacher.loras import fused_file
from ..training.changed_steps import reopen_stage
from ..training.end_to_end import train_end_to_end
from ..training.loop import Stopped
from ..training.run_identity import check_same_run, check_same_sources, run_identity, stage_identity
from ..training.run_lock import locked_folder
from ..training.stage_run import StageRun
from .check_ahead import check_ahead
from .export import export_file
from .summary import begin_text, device_text, end_text, memory_text

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

RUN_FILE, SOURCES_FILE = "run.yaml", "sources.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="RUN.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="name=value|MORE.yaml",
        help="fields of the run by dotted name, or further YAML files that override it",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan: parameters, FLOPs, memory, disk, tokens; train nothing"
    )
    parser.add_argument("--fields", action=_Fields, help="list the fields of a RUN.yaml, and exit")
    parser.add_argument("--gpu-memory", metavar="24GB", help="with --dry-run: say whether the run fits")
    parser.add_argument("--processes", type=int, metavar="N", help="with --dry-run: number of GPUs")
    parser.add_argument(
        "--strategy", choices=("ddp", "fsdp2", "zero2", "zero3"), help="with --dry-run: how GPUs share the work"
    )


class _Fields(argparse.Action):
    """Prints all fields of a run and exits, without the arguments that a run needs, as --help does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(fields_text())
        parser.exit()


def run(args: argparse.Namespace) -> int:
    config = load_run(args.file, args.overrides)
    if args.dry_run:
        from ..plan.estimate import plan_run
        from ..plan.text import plan_text

        plan = plan_run(config, processes=args.processes, strategy=args.strategy, gpu_memory=args.gpu_memory)
        print(plan_text(plan))
        return 0
    return distill(config)


def distill(run: RunConfig) -> int:
    """Run all stages that the run names and the student has. Return exit status 0, or 128 + the signal that stopped it."""
    with Ranks(run) as ranks, locked_folder(run.output_dir) if ranks.main else nullcontext():
        try:
            Distill(run, ranks).run_all()
        except Stopped:
            return 128 + ranks.stop_signal
    return 0


@dataclass(slots=True)
class Distill:
    """A run in its output_dir."""

    run: RunConfig
    ranks: Ranks

    def run_all(self) -> None:
        run = self.run
        train = train_end_to_end
        if run.training.blockwise:
            check_blockwise(run, self.ranks)
            train = train_blockwise
        began = time.monotonic()
        self.ranks.say(device_text(self.ranks.device, self.ranks.count, self.ranks.strategy))
        if self.ranks.main:
            prepare_folder(run)
        self.ranks.wait()
        path = self._teacher_file()
        self._check_teacher(path)
        data = open_source(run.data, run.output_dir, guidance=run.guidance, device=self.ranks.device)
        with sample_progress("Cache", shown=self.ranks.main) as progress:
            data.prepare(self.ranks.rank, self.ranks.count, progress)
        self.ranks.wait()
        identity = run_identity(run, path, data)
        self._begin(identity, path, data)
        if "convert" in run.stages:
            self._convert(path, data)
        teacher: FluxTransformer2DModel | None = None
        stages = self._training()
        if self.ranks.main:
            self.ranks.say(begin_text(run, data, stages, self.ranks.count))
            on_gpu = self.ranks.device.type == "cuda"
            if on_gpu and stages and (planned := memory_text(run, self.ranks.count, self.ranks.strategy)):
                self.ranks.say(planned)
        for stage in stages:
            done = run.output_dir / stage / "student.safetensors"
            if done.exists() and not self._reopened(stage):
                if self.ranks.main:
                    remove_working_files(done.parent)  # it was killed when it had written its student
                repeat = run.training.blockwise and run.resume == "changed"
                hint = f" Its blocks are trained; restart={stage} repeats them with other steps." if repeat else ""
                self.ranks.say(f"{stage}: {done} is there already.{hint}")
                continue
            source = latest_student(run, stage, trainable_stages(self._config()))
            if teacher is None:
                section = (
                    run.teacher.model_copy(update={"offload": "stream"}) if run.training.blockwise else run.teacher
                )
                teacher = open_frozen_teacher(section, self.ranks.device, fused=path if section.loras else None)
            # Everything else is quickly repeated or continued, and can be interrupted at once.
            with self.ranks.stoppable():
                train(
                    StageRun(
                        run=run,
                        stage=stage,
                        source=source,
                        folder=run.output_dir / stage,
                        tensorboard=run.output_dir / "tensorboard",
                        ranks=self.ranks,
                        teacher=teacher,
                        data=data,
                        identity=stage_identity(identity, stage),
                    )
                )
        if "export" in run.stages:
            target = self._export()
            if self.ranks.main:
                self.ranks.say(end_text(run, target, time.monotonic() - began, self.ranks.device))

    def _reopened(self, stage: Stage) -> bool:
        """Return whether a finished stage goes on, on every rank as on the main one."""
        reopened = self.ranks.main_value(int(self.ranks.main and reopen_stage(self.run, stage)))
        return bool(reopened)

    def _check_teacher(self, path: Path) -> None:
        """Check run and teacher before data are prepared. Its values count until the student is made of them."""
        with open_teacher(path) as teacher:
            if self.ranks.main:
                check_ahead(self.run, teacher.dims)
            if self.ranks.main and not converted_file(self.run).exists():
                teacher.check_values()

    def _begin(self, identity: dict[str, Any], path: Path, data: DataSource) -> None:
        """Check the run's sources against the stored ones, and remove the stages that are to be repeated."""
        run = self.run
        with open_teacher(path) as teacher:
            check_fits(data.batch(0, 1, run.seed), teacher.dims)
        if self.ranks.main:
            if run.restart is not None:
                for stage in STAGES[STAGES.index(run.restart) :]:
                    shutil.rmtree(run.output_dir / stage, ignore_errors=True)
            check_same_sources(identity, data, run.output_dir / SOURCES_FILE)
        self.ranks.wait()

    def _teacher_file(self) -> Path:
        """Return the teacher's file; with LoRAs the fused file in the run's folder, written if it is missing."""
        section = self.run.teacher
        if not section.loras:
            return section.path
        fused = self.run.output_dir / "teacher.safetensors"
        with self.ranks.main_first():
            fused_file(section, fused, self.ranks.say)
        return fused

    def _convert(self, path: Path, data: DataSource) -> None:
        target = converted_file(self.run)
        with self.ranks.main_first():
            if not self.ranks.main:
                return
            if target.exists():
                self.ranks.say(f"convert: {target} is there already.")
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.run.student.start is not None:
                self._begin_with(self.run.student.start, path, target)
                return
            settings = settings_from_run(self.run, path, target, target.parent / "calibration")
            run_conversion(settings, data, report=self.ranks.say)

    def _begin_with(self, start: Path, teacher: Path, target: Path) -> None:
        """Copy a student from another run. Raises UserError if it was made from a different teacher."""
        config = check_file(start)
        with open_teacher(teacher) as opened:
            dims, expected = config.dims, opened.dims
        if "teacher_outputs" in config.provenance:  # of pruned depth
            expected = expected.with_depths(**dims.depths)
        if dims != expected:
            raise UserError(
                f"student.start: {start} was made from another teacher: it has {dims}, {teacher} has {expected}. Give a "
                "student of this teacher, or leave student.start out."
            )
        export_file(start, target, getattr(torch, self.run.student.dtype))
        self.ranks.say(f"convert: starts with {start}.")

    def _training(self) -> list[Stage]:
        """Return the training stages of this run that its student has. Raises UserError if there is no student yet."""
        wanted = [stage for stage in self.run.stages if stage in TRAINING]
        if not wanted:
            return []
        has = trainable_stages(self._config())
        for stage in wanted:
            if stage not in has:
                self.ranks.say(f"{stage}: nothing to train in a student without {stage}.")
        return [stage for stage in wanted if stage in has]

    def _config(self) -> FluxMoEConfig:
        target = converted_file(self.run)
        if not target.exists():
            raise UserError(f"{target} is missing; stage `convert` makes it. Put it into `stages`.")
        return check_file(target)

    def _export(self) -> Path:
        run = self.run
        target = run.output_dir / run.export.file
        with self.ranks.main_first():
            if self.ranks.main:
                source = latest_student(run, "export", trainable_stages(self._config()))
                export_file(source, target, getattr(torch, run.export.dtype))
                self.ranks.say(f"export: {target}, of {source.parent.name}.")
        return target


def converted_file(run: RunConfig) -> Path:
    return run.output_dir / "convert" / "student.safetensors"


def latest_student(run: RunConfig, stage: Stage, has: tuple[Stage, ...]) -> Path:
    """Return the student with which a stage starts, from the stage before. Raises UserError if that has not been run.

    `has`: the training stages of this student. Stages with no steps may be left out of a run.
    """
    for earlier in reversed([s for s in STAGES[: STAGES.index(stage)] if s == "convert" or s in has]):
        found = run.output_dir / earlier / "student.safetensors"
        if found.exists():
            return found
        if earlier == "convert" or getattr(run.stage, earlier).steps > 0:
            break
    raise UserError(
        f"Stage {stage} starts with {found}, which is missing. Run stage {earlier} first (stages=[{earlier}])"
        + ("." if earlier == "convert" else f", or leave it out (stage.{earlier}.steps=0).")
    )


def prepare_folder(run: RunConfig) -> None:
    """Create output_dir and store the resolved run in it. Raises UserError if it has another run."""
    folder = run.output_dir
    stored = folder / RUN_FILE
    if stored.exists():
        check_same_run(run, stored)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(stored) as part:
            part.write_text(run.model_copy(update={"restart": None}).to_yaml())  # one restart is enough
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); name another output_dir.") from None

"""A training stage block by block against the teacher's features, for a 12 B model on one GPU.

One block of the teacher is in memory at a time, and one block of the student (in stage `blocks`, one group) with its
optimizer. Both are read from their files, the features from the disk (feature_store.py). The input of every part is the
teacher's own features, not the student's, so parts do not depend on each other; U of the AdaLN compression, which all
blocks share, is not trained. So this initialises a student, and end-to-end distillation follows.

Each finished part is a file. A run that was stopped or killed resumes with the first part that has none, at that part's
last checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2m_model.blocks import Block
from d2m_model.checkpoint import CONFIG_KEY, config_tensor
from d2m_model.config import FluxMoEConfig
from d2m_model.conversion.convert import file_metadata
from d2m_model.hosts.diffusers import dims_of_transformer
from d2m_model.keys import dense_shapes
from d2m_model.tensor_file import Shape, TensorFile, bytes_of
from d2m_model.tensor_writer import TensorWriter

from .. import UserError
from ..data.token_counts import longest_sample
from ..distillation.stages import StagePlan, teacher_outputs, trainable_names
from ..monitor.stage_log import StageLog
from ..parallel.ranks import Ranks
from ..run_config import RunConfig
from ..training.changed_steps import changeable, schedule_text, stored_identity
from ..training.checkpoints import Checkpoints
from ..training.loop import Stopped, TrainingLoop
from ..training.parameter_sizes import ParameterSize, checkpoint_bytes
from ..training.stage_run import StageRun
from ..training.student_file import fill_student, meta_student
from ..training.trainee import Trainee
from .feature_store import FeatureStore, disk_bytes
from .part import Part, PartBlocks, PartObjective

if TYPE_CHECKING:
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

_PART_STEPS = "d2m_steps"  # in the metadata of a trained part's file


def check_blockwise(run: RunConfig, ranks: Ranks) -> None:
    """Raise UserError for options that blockwise mode does not support."""
    if ranks.strategy != "single":
        raise UserError(
            f"training.blockwise is for a single process; here are {ranks.count} ({ranks.strategy}). Start it "
            "without accelerate launch, or leave out training.blockwise: several GPUs share a student by FSDP2."
        )
    if run.teacher.quantise is not None:
        raise UserError(
            f"training.blockwise reads the teacher's own weights, block by block; leave out teacher.quantise "
            f"({run.teacher.quantise})."
        )
    if run.losses.feature == 0:
        raise UserError("training.blockwise trains by the feature loss alone; losses.feature is 0.")


def train_blockwise(stage_run: StageRun) -> None:
    """Train the stage part by part and write the student. The teacher is one with `offload: stream`.

    Raises Stopped after SIGTERM, and UserError or CheckpointError for whatever the user can correct.
    """
    _Blockwise(stage_run).train()


def split_into_parts(
    config: FluxMoEConfig, plan: StagePlan, trainable: Collection[str], teacher_doubles: int
) -> list[Part]:
    """Split a student into the parts that a stage trains, in order: blocks, and groups where they choose their blocks.

    Parts without trained weights are left out. `teacher_doubles` is the number of the teacher's double blocks, of which a
    depth-pruned student has fewer. The target of a block is the output of the teacher's block that it stands for; its
    input, the target of the block before.
    """
    outputs = teacher_outputs(config)
    groups = {block: number for number, group in enumerate(config.groups) for block in group.members}
    parts: list[Part] = []
    depth = 0
    for block in config.dims.blocks:
        kind, index = block.kind, block.index
        if block == Block("single", 0):
            depth = teacher_doubles
        start, depth = depth, outputs[kind][index] + 1 + (teacher_doubles if kind == "single" else 0)
        number = groups.get(block) if plan.groups_on else None
        if number is None:
            parts.append(Part(name=block.name, kind=kind, blocks=(index,), start=start, end=depth, group=None))
        elif parts and parts[-1].group == number:
            last = parts.pop()
            parts.append(
                Part(
                    name=last.name,
                    kind=kind,
                    blocks=(*last.blocks, index),
                    start=last.start,
                    end=depth,
                    group=number,
                )
            )
        else:
            name = f"block_groups.{number}"
            parts.append(Part(name=name, kind=kind, blocks=(index,), start=start, end=depth, group=number))
    return [part for part in parts if any(part.has(name) for name in trainable)]


def remove_working_files(folder: Path) -> None:
    """Delete what a finished stage in blockwise mode was trained with. `parts` is last: only blockwise stages have it."""
    if (folder / "parts").is_dir():
        for name in ("features", "checkpoints", "parts"):
            shutil.rmtree(folder / name, ignore_errors=True)


class _Blockwise:
    """One stage in blockwise mode."""

    def __init__(self, stage_run: StageRun) -> None:
        self.stage_run, self.run, self.ranks = stage_run, stage_run.run, stage_run.ranks
        core, self.plan = meta_student(stage_run)
        self.config = self.plan.config
        trainable = trainable_names(core, self.plan)
        self.parts = split_into_parts(
            self.config, self.plan, trainable, dims_of_transformer(stage_run.teacher).depths["double"]
        )
        self._check_outside(trainable)
        self.specs = self._specs()
        self.weights = [ParameterSize.of(name, p) for name, p in core.named_parameters() if name in trainable]
        self.names = {part.name: self._names_of(core, part) for part in self.parts}
        self.store = FeatureStore(
            stage_run.folder / "features",
            stage_run.teacher,
            stage_run.data,
            self.run,
            report=self.ranks.say,
            check_stop=self._check_stop,
        )
        self.log: StageLog | None = None

    def train(self) -> None:
        stage_run, steps = self.stage_run, self.stage_run.section.steps
        stage_run.folder.mkdir(parents=True, exist_ok=True)
        done = self._done()
        self._check_disk()
        start = 0
        if done < len(self.parts):
            start = (self._checkpoints(self.parts[done]).steps() or [0])[-1]
        self._check_steps(done, start)
        if done or start:
            at = f"step {start} of {self.parts[done].name}" if done < len(self.parts) else "the end"
            self.ranks.say(f"{stage_run.stage}: going on at {at}, {done} of {len(self.parts)} parts are trained.")
        with stage_run.open_log(steps=steps * len(self.parts), start=done * steps + start) as self.log:
            for number in range(done, len(self.parts)):
                self._train_part(number, self.log)
        self.store.remove()
        self._write_student()
        remove_working_files(stage_run.folder)

    def _check_steps(self, done: int, start: int) -> None:
        """Say what resume=changed does to the part that goes on. Raises UserError for fewer steps than are done.

        Finished parts stay as they are. Steps are numbered over all parts, so that a later part has no fewer.
        """
        stage, section = self.stage_run.stage, self.stage_run.section
        least = start
        if done:
            with TensorFile(self._file(self.parts[done - 1])) as file:
                least = max(least, int(file.metadata.get(_PART_STEPS, 0)))
        if section.steps < least:
            raise UserError(
                f"stage.{stage}.steps is {section.steps}, but {least} are done of a block already; expected {least} or more."
            )
        if start:
            before = stored_identity(self._checkpoints(self.parts[done]), start)
            if text := schedule_text(stage, before, section, self.run.training, start):
                self.ranks.say(f"{text} Blocks that are trained already stay as they are.")

    def _train_part(self, number: int, log: StageLog) -> None:
        part = self.parts[number]
        log.begin_part("block", part.name)
        with log.paused():
            self.store.provide(part.start, part.end)
        core, _ = meta_student(self.stage_run)
        if core.adaln_in is not None:
            core.adaln_in.requires_grad_(False)
        fill_student(core, self.stage_run, only={*self.names[part.name], "adaln_in.weight"})
        blocks = PartBlocks(core, part, checkpointing=self.run.training.gradient_checkpointing)
        trainee = Trainee(self.stage_run, blocks, list(blocks.blocks))
        objective = PartObjective(self.stage_run, trainee, part, number, self.plan, self.store)
        checkpoints = self._checkpoints(part)
        loop = TrainingLoop(self.stage_run, trainee, objective, checkpoints)
        loop.run_steps(loop.resume(), log)
        with trainee.averaged():
            objective.finish(log)
            self._write_part(core, part)
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        del core, blocks, trainee, objective, loop
        self.ranks.release()

    def _check_stop(self) -> None:
        """Stop between two entries of the features, and so between two parts, if asked to. Complete entries stay."""
        if self.ranks.stop_asked():
            if self.log is not None:
                self.log.event("stopped", message=f"Stage {self.stage_run.stage}: stopped; resume=latest goes on there")
            raise Stopped

    # Trained weights

    def _names_of(self, core: FluxMoETransformer2DModel, part: Part) -> list[str]:
        """Names of a part's tensors in the file."""
        from d2m_model.hosts.diffusers.tensor_map import tensor_map

        slices = tensor_map(self.config, core.optional)
        return [name for name, found in slices.items() if any(part.has(one.name) for one in found)]

    def _check_outside(self, trainable: Collection[str]) -> None:
        """Raise UserError if a pattern of the run trains weights outside of blocks."""
        outside = sorted(name for name in trainable if not any(part.has(name) for part in self.parts))
        if others := [name for name in outside if not name.startswith("adaln_in.")]:
            raise UserError(
                f"stage.{self.stage_run.stage}.trainable: {others[0]} is in no block; training.blockwise trains blocks alone. "
                "Leave it out, or train end to end."
            )
        if outside:
            self.ranks.say(f"{self.stage_run.stage}: U of the AdaLN compression stays as it is; all blocks share it.")

    # Files

    def _specs(self) -> dict[str, tuple[torch.dtype, Shape]]:
        """Return dtype and shape of each tensor in the stage's student, the same as train_end_to_end writes."""
        dtype, dense = self.stage_run.dtype, dense_shapes(self.config.dims)
        with TensorFile(self.stage_run.source) as file:
            specs = {
                name: (dtype if name in dense else file.dtypes[name], shape) for name, shape in file.shapes.items()
            }
        config = config_tensor(self.config)
        return specs | {CONFIG_KEY: (config.dtype, tuple(config.shape))}

    def _file(self, part: Part) -> Path:
        return self.stage_run.folder / "parts" / f"{part.name}.safetensors"

    def _done(self) -> int:
        """Return how many parts are trained."""
        return next((n for n, part in enumerate(self.parts) if not self._file(part).exists()), len(self.parts))

    def _checkpoints(self, part: Part) -> Checkpoints:
        checkpoints = self.stage_run.checkpoints(self.stage_run.checkpoint_folder / part.name, block=part.name)
        if self.run.resume == "changed":
            checkpoints.free = changeable(self.stage_run.stage)
        return checkpoints

    def _write_part(self, core: FluxMoETransformer2DModel, part: Part) -> None:
        """Write a trained part. Frozen weights are copied from the source bit for bit, whatever dtype they had in training."""
        from d2m_model.hosts.diffusers import flux_moe_tensors

        file = self._file(part)
        metadata = {"d2m_part": part.name, _PART_STEPS: str(self.stage_run.section.steps)}
        file.parent.mkdir(parents=True, exist_ok=True)
        specs = {name: self.specs[name] for name in self.names[part.name]}
        frozen = {name for name, parameter in core.named_parameters() if not parameter.requires_grad}
        with TensorWriter(file, specs, metadata) as writer, TensorFile(self.stage_run.source) as source:
            for name, tensor in flux_moe_tensors(core, self.config, only=specs, unchanged=frozen, stored=source.tensor):
                writer.put(name, tensor.to(specs[name][0]))
            writer.finish(metadata)

    def _write_student(self) -> None:
        """Write the student from its trained parts and, for all other tensors, the source file; tensor by tensor."""
        metadata = file_metadata(self.config)
        trained = {name: part for part in self.parts for name in self.names[part.name]}
        with TensorWriter(self.stage_run.student, self.specs, metadata) as writer:
            writer.put(CONFIG_KEY, config_tensor(self.config))
            for path, names in self._origins(trained):
                with TensorFile(path) as file:
                    for name in names:
                        writer.put(name, file.tensor(name).to(self.specs[name][0]))
                        file.release(name)
            writer.finish(metadata)

    def _origins(self, trained: dict[str, Part]) -> list[tuple[Path, list[str]]]:
        others = [name for name in self.specs if name not in trained and name != CONFIG_KEY]
        return [(self.stage_run.source, others), *((self._file(part), self.names[part.name]) for part in self.parts)]

    # The disk

    def _check_disk(self) -> None:
        """Print what the stage will take of the disk. Raises UserError if there is too little."""
        stage, steps, folder = self.stage_run.stage, self.stage_run.section.steps, self.stage_run.folder
        parts = stage_disk(
            self.run,
            self.stage_run.teacher.inner_dim,
            longest_sample(self.run.data).joint,
            self.specs,
            [(self.names[part.name], [w for w in self.weights if part.has(w.name)]) for part in self.parts],
        )
        needed = sum(parts.values())
        listed = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())
        self.ranks.say(
            f"{stage}: {len(self.parts)} parts of {steps} steps each, one by one. Disk: {listed}. "
            "Each is measured on held-out features; the whole student is not validated here."
        )
        existing = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(folder).free
        if free + existing < needed:
            raise UserError(
                f"{folder}: stage {stage} needs {needed:,} bytes of the disk, {free:,} are free: {listed}. "
                "Make room, or take fewer training.blockwise_samples."
            )


def stage_disk(
    run: RunConfig,
    hidden_size: int,
    tokens: int,
    specs: dict[str, tuple[torch.dtype, Shape]],
    parts: Sequence[tuple[Collection[str], Sequence[ParameterSize]]],
) -> dict[str, int]:
    """Return the most that a stage takes of the disk, in bytes, by purpose.

    `specs`: tensors of the student's file. `parts`: for each part, the names of its tensors there and its trained
    parameters. `tokens`: the most that a sample has.
    """
    checkpoints = [checkpoint_bytes(run, trained) for _, trained in parts]
    return {
        "the teacher's features": disk_bytes(run, hidden_size, tokens),
        "trained parts": sum(bytes_of(*specs[name]) for names, _ in parts for name in names),
        "checkpoints": (run.checkpoints.keep + 1) * max(checkpoints, default=0),
        "student": sum(bytes_of(*spec) for spec in specs.values()),
    }

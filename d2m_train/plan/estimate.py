"""An estimate of a run before it begins (`distill --dry-run`): parameters, FLOPs, memory, disk and tokens.

No weights are read: the teacher's header is enough or, without its file, `teacher.dims`. Bytes of weights, gradients and
optimizer state are counted on the student itself, built without values; activations, on its own forward pass
(activations.py). Memory that the GPU's libraries and the allocator take is not included.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from d2m_model.checkpoint import check_file, expected_tensors, optional_tensors
from d2m_model.config import FluxDims, FluxMoEConfig, Teacher
from d2m_model.conversion.block_routers import BlockChange
from d2m_model.conversion.convert import UNHASHED
from d2m_model.conversion.depth_pruning import kept_blocks
from d2m_model.cost import DENSE, Conversion, Tokens, flux
from d2m_model.keys import dense_shapes
from d2m_model.teacher import open_teacher

from .. import UserError
from ..blockwise.feature_store import disk_bytes
from ..blockwise.part import Part
from ..blockwise.stage import split_into_parts
from ..conversion.run import shallow
from ..conversion.settings import file_config, settings_from_run
from ..data.token_counts import longest_sample, mean_sample
from ..distillation.stages import TRAINING, plan_stage, trainable_stages
from ..run_config import RunConfig, Stage
from ..teacher.known_flux import KNOWN_DIMS
from ..training.parameter_sizes import ParameterSize, checkpoint_bytes
from .activations import feature_bytes, optional_names, saved_activations, valueless_student, without_values
from .memory import Strategy, blockwise_memory, loading_memory, shared_memory, teacher_bytes
from .run_plan import GIB, RunPlan, StageEstimate
from .speed import stage_seconds


def plan_run(
    run: RunConfig, *, processes: int | None = None, strategy: str | None = None, gpu_memory: str | None = None
) -> RunPlan:
    """Plan a run on `processes` GPUs (default: as many as the launcher says, else one) that share it by `strategy`.

    `gpu_memory` of each, such as 24GB; by default that of this machine's GPU. Raises UserError and CheckpointError for
    problems that would stop the run too, and UserError if the teacher's file is missing and `teacher.dims` is not set.
    """
    count = processes or int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_strategy(strategy, count)
    teacher, teacher_dtypes = _teacher(run)
    config = student_config(run, teacher)
    tokens = longest_sample(run.data)
    dense, student = flux(teacher, DENSE, tokens), flux(config.dims, Conversion.of(config), tokens)
    names = [stage for stage in run.stages if stage in TRAINING and stage in trainable_stages(config)]
    setting = _Setting(run=run, config=config, teacher=teacher, tokens=tokens, processes=count, strategy=chosen)
    stages = tuple(setting.estimate(stage) for stage in names)
    return RunPlan(
        title=f"{_what(run, config)} of {run.teacher.path.name}",
        processes=count,
        strategy=chosen,
        tokens=tokens,
        dense=dense,
        student=student,
        stages=stages,
        host={"teacher's blocks": teacher_bytes(run, teacher)[1]} if run.teacher.offload == "cpu" else {},
        disk=_disk(run, config, teacher, teacher_dtypes, stages),
        gpu_memory=parse_gpu_memory(gpu_memory),
        seconds=stage_seconds(run.output_dir, stages),
        notes=tuple(_notes(run, chosen, stages)),
    )


def choose_strategy(name: str | None, processes: int) -> Strategy:
    """Return the named strategy, or the default one. Raises UserError for one that `processes` cannot use."""
    if processes == 1 and name in (None, "single", "ddp"):
        return "single"
    if name in (None, "ddp"):
        return "ddp"
    for sharing in ("fsdp2", "zero2", "zero3"):
        if name == sharing:
            return sharing
    raise UserError(f"{name} is no strategy of {processes} processes; expected ddp, fsdp2, zero2 or zero3.")


def parse_gpu_memory(text: str | None) -> int | None:
    """Return the bytes of `24GB`, `80GiB` or `24`; for None, those of this machine's GPU, if it has one.

    GB counts as GiB, as GPUs are sold. Raises UserError for anything else.
    """
    if text is None:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"--gpu-memory is {text!r}; expected gigabytes, like 24GB.")
    return int(float(match[1]) * GIB)


# Teacher and student


def _teacher(run: RunConfig) -> tuple[FluxDims, dict[str, torch.dtype]]:
    """Return dimensions and dtype of each tensor, from the file's header or, without a file, from `teacher.dims`."""
    section = run.teacher
    if section.path.exists() or section.dims is None:
        if not section.path.exists():
            raise UserError(
                f"{section.path}: there is no such file. Fetch it, or say what it is by teacher.dims "
                f"({', '.join(KNOWN_DIMS)}): that is enough for --dry-run."
            )
        with open_teacher(section.path) as teacher:
            return teacher.dims, teacher.dtypes
    dims = KNOWN_DIMS[section.dims]
    return dims, dict.fromkeys(dense_shapes(dims), torch.bfloat16)


def student_config(run: RunConfig, teacher: FluxDims) -> FluxMoEConfig:
    """Return the configuration of the converted file or, before it exists, the one that conversion would write."""
    converted = run.output_dir / "convert" / "student.safetensors"
    for made in (converted, run.student.start):
        if made is not None and made.exists():
            return check_file(made)
    settings = settings_from_run(run, run.teacher.path, converted, None).resolved()
    about = Teacher(title=run.teacher.path.stem, sha256=UNHASHED, licence="")
    config = file_config(settings, teacher, about, None)
    if run.student.baseline == "depth_pruning":
        # Only calibration knows which of a group's blocks are kept, but they all have the same size.
        alike = dict.fromkeys((block.name for block in teacher.blocks), BlockChange(mse=1, image_mse=1))
        kept = kept_blocks(teacher, config.groups, alike)
        dims = teacher.with_depths(double=len(kept["double"]), single=len(kept["single"]))
        config = shallow(config, dims, kept)
    return config


def _what(run: RunConfig, config: FluxMoEConfig) -> str:
    name = {"none": f"FLUX-MoE {run.student.preset}", "mlp_pruning": "MLP pruning", "depth_pruning": "Depth pruning"}
    return f"{name[run.student.baseline]} ({' + '.join(map(str, config.dims.depths.values()))} blocks)"


# A stage


@dataclass(kw_only=True, slots=True, frozen=True)
class _Setting:
    """The values that all stages of a run share. `teacher` holds the teacher's dimensions, `config` is the student's."""

    run: RunConfig
    config: FluxMoEConfig
    teacher: FluxDims
    tokens: Tokens
    processes: int
    strategy: Strategy

    def estimate(self, stage: Stage) -> StageEstimate:
        run, section = self.run, getattr(self.run.stage, stage)
        plan = plan_stage(stage, self.config, section)
        with without_values():
            core = valueless_student(run, plan, self.config)
            weights = [ParameterSize.of(name, tensor) for name, tensor in core.named_parameters()]
            buffers = sum(buffer.nbytes for buffer in core.buffers())
            activations = saved_activations(run, plan, core, self.teacher, self.tokens)
            working = activations
            if run.training.gradient_checkpointing:
                core.disable_gradient_checkpointing()
                working = saved_activations(run, plan, core, self.teacher, self.tokens)
        trained = [weight for weight in weights if weight.trained]
        samples = section.steps * run.training.accumulation * run.training.batch_size * self.processes
        parts: list[Part] = []
        saved = [trained]
        if run.training.blockwise:
            parts = split_into_parts(
                self.config, plan, {weight.name for weight in trained}, self.teacher.depths["double"]
            )
            saved = [[weight for weight in trained if part.has(weight.name)] for part in parts]
            samples *= len(parts)
            memory = blockwise_memory(run, self.teacher, parts, weights, activations, working, self.tokens)
        else:
            memory = shared_memory(run, weights, buffers, self.processes, self.strategy)
            memory["teacher's weights"] = teacher_bytes(run, self.teacher)[0]
            memory["activations"] = activations.total
            if working is not activations:
                memory["one block's, computed again"] = working.largest_block
            memory["block outputs to compare"] = feature_bytes(run, plan, self.teacher, self.tokens)
            loading = loading_memory(weights, self.strategy) + memory["teacher's weights"]
            if loading > (training := sum(memory.values())):
                memory["more while it is loaded"] = loading - training
        return StageEstimate(
            stage=stage,
            steps=section.steps,
            trained=sum(weight.count for weight in trained),
            samples=samples,
            tokens=round(samples * mean_sample(run.data)),
            flops=self._flops(weights, len(parts)),
            memory=memory,
            checkpoint=max((checkpoint_bytes(run, part) for part in saved), default=0),
            parts=tuple(sum(w.nbytes for w in weights if part.has(w.name)) for part in parts),
        )

    def _flops(self, weights: Sequence[ParameterSize], parts: int) -> float:
        """FLOPs of one sample's step: teacher forward; student forward, backward through its activations and its trained
        weights, and forward again under gradient checkpointing. All blocks of a group run, and are masked.

        In blockwise mode: the FLOPs of one of `parts` parts, without the teacher.
        """
        groups = tuple(replace(group, active=group.blocks) for group in self.config.groups)
        student = flux(self.config.dims, Conversion.of(replace(self.config, groups=groups)), self.tokens).flops
        share = sum(weight.count for weight in weights if weight.trained) / sum(weight.count for weight in weights)
        again = 1 if self.run.training.gradient_checkpointing else 0
        if parts:
            return student * (2 + share) / parts
        return flux(self.teacher, DENSE, self.tokens).flops + student * (2 + share + again)


# The disk


def _disk(
    run: RunConfig,
    config: FluxMoEConfig,
    teacher: FluxDims,
    teacher_dtypes: dict[str, torch.dtype],
    stages: Sequence[StageEstimate],
) -> dict[str, int]:
    dense = dense_shapes(config.dims)
    shapes = expected_tensors(config) | {name: optional_tensors(config)[name] for name in optional_names(run, config)}

    def file(dtype: torch.dtype | None) -> int:
        sizes = (
            math.prod(shape) * ((dtype or teacher_dtypes.get(name, torch.bfloat16)).itemsize if name in dense else 4)
            for name, shape in shapes.items()
        )
        return sum(sizes)

    disk: dict[str, int] = {}
    if run.teacher.loras:
        disk["teacher with its LoRAs"] = sum(
            math.prod(shape) * teacher_dtypes[name].itemsize for name, shape in dense_shapes(teacher).items()
        )
    if "convert" in run.stages:
        disk["converted student"] = file(None)
    trained = getattr(torch, run.student.dtype)
    for stage in stages:
        disk[f"student after {stage.stage}"] = file(trained)
        if not run.training.blockwise:
            # One more, while it is being written.
            disk[f"checkpoints of {stage.stage}"] = stage.checkpoint * (min(run.checkpoints.keep, stage.steps) + 1)
    if run.training.blockwise and stages:
        # The largest stage counts, since stages follow each other.
        kept = run.checkpoints.keep + 1
        disk["checkpoints of a block"] = max(stage.checkpoint for stage in stages) * kept
        disk["trained blocks"] = max(sum(stage.parts) for stage in stages)
        disk["teacher's features"] = disk_bytes(run, teacher.hidden_size, longest_sample(run.data).joint)
    if "export" in run.stages:
        disk["export"] = file(getattr(torch, run.export.dtype))
    return disk


def _notes(run: RunConfig, strategy: Strategy, stages: Sequence[StageEstimate]) -> list[str]:
    notes = []
    if not run.teacher.path.exists():
        notes.append(f"{run.teacher.path} is not here: taken for {run.teacher.dims}, in bfloat16.")
    if strategy == "fsdp2" and run.training.accumulation > 1:
        notes.append(
            f"FSDP2: gradients are reduced at each of a step's {run.training.accumulation} microbatches, so that they "
            "stay sharded between them."
        )
    if strategy in ("zero2", "zero3"):
        notes.append("DeepSpeed's share is estimated, not counted.")
    if run.training.optimizer == "adamw_8bit":
        notes.append("The state of 8-bit AdamW is estimated, not counted.")
    if run.training.blockwise:
        parts = ", ".join(f"{stage.stage} {len(stage.parts)}" for stage in stages)
        notes.append(
            f"Blockwise: steps are of each block or group ({parts}). Once a stage the teacher makes the features of "
            f"{run.training.blockwise_samples:,} samples, block by block."
        )
    if run.data.source not in ("emoji", "latents") and stages:
        notes.append("The cache of latents and text embeddings comes on top: see `python -m d2m_train cache`.")
    return notes

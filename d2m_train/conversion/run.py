"""Conversion of a dense FLUX.1 to a FLUX-MoE without training: the command `convert`, and a run's first stage.

`run_conversion` calibrates on the teacher (if there are data), decides on blocks and routers, and streams the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from d2m_model.config import FluxDims, FluxMoEConfig, all_ffn_names
from d2m_model.conversion.calibration import Calibration
from d2m_model.conversion.convert import convert_file, describe_teacher, refuse_same_file
from d2m_model.conversion.depth_pruning import ShallowTeacher, TeacherBlocks, kept_blocks, output_blocks, teacher_name
from d2m_model.conversion.groups import auto_groups, with_choice
from d2m_model.conversion.method import MethodError
from d2m_model.conversion.new_tensors import block_group_tensors, fitted_modulations, planner
from d2m_model.teacher import DenseTeacher, open_teacher
from d2m_model.tensor_file import CheckpointError

from .. import UserError
from ..data.batch import DataSource
from ..fingerprint import fingerprint
from ..progress import progress_bar
from .calibrate import CalibrationBatches, calibrate_on_batches
from .report import Report, summarise, write_report
from .settings import ConversionSettings, file_config

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


def run_conversion(
    settings: ConversionSettings, data: DataSource | None = None, *, report: Callable[[str], object] = print
) -> FluxMoEConfig:
    """Write `settings.out` and its report, and return its configuration. An interrupted calibration is continued.

    Without calibration `data` everything is derived from the weights. `report` gets sentences for the user. Raises
    UserError for settings that cannot be met, CheckpointError for a teacher or a target that cannot be used.
    """
    settings = settings.resolved()
    if data is None:
        settings.check_data()
    if not (folder := settings.out.absolute().parent).is_dir():  # checked before minutes of calibration, not after
        raise CheckpointError(f"{folder}: there is no such folder. Create it, or write elsewhere.")
    with open_teacher(settings.teacher) as teacher:
        refuse_same_file(teacher.files, settings.out)
        for note in teacher.notes:
            report(note)
        config = file_config(settings, teacher.dims, describe_teacher(teacher), None if data is None else data.name)
        calibration = None if data is None else _calibration(settings, teacher, config, data)
        measured = Report()
        if calibration is not None:
            measured.blocks.update({block.name: calibration.block_change(block.name) for block in teacher.dims.blocks})
        if settings.groups == "auto":
            placed = auto_groups(settings.preset, teacher.dims, measured.blocks)
            config = replace(config, groups=with_choice(placed, settings.active, settings.selection))
        kept: TeacherBlocks | None = None
        source: DenseTeacher | ShallowTeacher = teacher
        if settings.baseline == "depth_pruning":
            kept = kept_blocks(teacher.dims, config.groups, measured.blocks)
            source = ShallowTeacher(teacher, kept)
            config = shallow(config, source.dims, kept)
        try:
            groups = block_group_tensors(settings, config, calibration, measured.groups, measured.stand_ins)
        except MethodError as error:
            raise UserError(f"{error} Calibrate with more batches or larger ones.") from None
        modulations = fitted_modulations(source.tensor, config, calibration)
        with progress_bar(total=teacher.size, desc="Converting", unit="B", unit_scale=True) as bar:
            config = convert_file(
                source,
                settings.out,
                config,
                planner(settings, config, calibration, measured.ffns, device=settings.torch_device, kept=kept),
                modulations=modulations,
                router_bias=settings.recipe.router == "ridge",
                expert_mean=settings.recipe.mean,
                block_groups=groups,
                progress=bar.update,
            )
    if calibration is not None and settings.folder is None:
        shutil.rmtree(settings.calibration_folder)
    if modulations is not None:
        measured.modulations.update(modulations.errors)
    summarise(measured, config, settings.out, report)
    file = settings.report_file or settings.out.with_name(f"{settings.out.name}.report.json")
    write_report(measured, config, file, report)
    return config


def shallow(config: FluxMoEConfig, dims: FluxDims, kept: TeacherBlocks) -> FluxMoEConfig:
    """The configuration of a student with the kept blocks alone: their FFNs, no groups, which blocks they were, and
    whose outputs they are to give."""
    ffns = {
        name: config.ffns[source] for name in all_ffn_names(dims) if (source := teacher_name(name, kept)) in config.ffns
    }
    blocks = {"teacher_blocks": kept, "teacher_outputs": output_blocks(config.groups, kept)}
    return replace(config, dims=dims, ffns=ffns, groups=(), stand_in_rank=None, provenance=config.provenance | blocks)


# What is asked of the teacher


def _calibration(
    settings: ConversionSettings,
    teacher: DenseTeacher,
    config: FluxMoEConfig,
    data: DataSource,
) -> Calibration:
    device = settings.torch_device

    def load() -> FluxTransformer2DModel:
        from d2m_model.hosts.diffusers import load_transformer

        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_transformer(settings.teacher, dtype, device)
        if device.type != "cpu":
            model.enable_gradient_checkpointing()
        return model

    calibration = CalibrationBatches(
        batches=settings.batches,
        batch_size=settings.batch_size,
        tokens=settings.tokens,
        taylor=settings.taylor,
        seed=settings.recipe.seed,
        streams=settings.stand_ins,
    )
    with progress_bar(total=settings.batches, desc="Calibration", unit="batch") as bar:

        def progress(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        return calibrate_on_batches(
            load,
            teacher.dims,
            list(config.ffns),
            data,
            calibration,
            settings.calibration_folder,
            fingerprint(teacher.files),
            progress,
        )

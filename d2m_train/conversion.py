"""A dense FLUX.1 becomes a FLUX-MoE without training: the `convert` command and the first stage of a distillation.

`convert` asks the teacher (calibration, if there are data), decides, and streams the file; `settings_of` says of a run
what its first stage is to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2m_model.config import FluxDims, FluxMoEConfig, all_ffn_names
from d2m_model.conversion.adaln import FittedModulations, VecMoments
from d2m_model.conversion.block_routers import plan_block_routers, random_block_routers_of
from d2m_model.conversion.convert import convert_file, describe_teacher, refuse_same_file
from d2m_model.conversion.ffn import FFNReport, plan_with_data, plan_without_data
from d2m_model.conversion.groups import auto_groups, block_names, with_choice
from d2m_model.conversion.importance import weight_norm_importance
from d2m_model.conversion.plan import FFNPlan, FFNWeights
from d2m_model.conversion.shallow import ShallowTeacher, TeacherBlocks, kept_blocks, outputs_of, teacher_name
from d2m_model.keys import dense_shapes
from d2m_model.teacher import DenseTeacher, open_teacher
from d2m_model.tensor_file import CheckpointError

from . import UserError
from .calibrate import Calibration, CalibrationSettings, calibrate
from .conversion_report import Report, tell, write_report
from .conversion_settings import ConversionSettings, config_of, settings_of
from .data.batch import DataSource

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

__all__ = ["ConversionSettings", "convert", "settings_of"]


def convert(
    settings: ConversionSettings, data: DataSource | None = None, *, report: Callable[[str], object] = print
) -> FluxMoEConfig:
    """Write `settings.out` and its report; give its configuration. A calibration that was interrupted is continued.

    `data`: for calibration; without, the weights alone decide. `report` hears sentences for the user.
    Raises UserError for settings that cannot be met, CheckpointError for a teacher or a target that cannot be used.
    """
    from tqdm import tqdm

    settings = settings.resolved()
    if data is None:
        settings.check_data()
    if not (folder := settings.out.absolute().parent).is_dir():  # before minutes of calibration rather than after
        raise CheckpointError(f"{folder}: there is no such folder. Create it, or write elsewhere.")
    with open_teacher(settings.teacher) as teacher:
        refuse_same_file(teacher.files, settings.out)
        for note in teacher.notes:
            report(note)
        config = config_of(settings, teacher.dims, describe_teacher(teacher), None if data is None else data.name)
        calibration = None if data is None else _calibration(settings, teacher, config, data)
        found = Report()
        if calibration is not None:
            found.blocks.update({name: calibration.block_change(name) for name in block_names(teacher.dims)})
        if settings.groups == "auto":
            placed = auto_groups(settings.preset, teacher.dims, found.blocks)
            config = replace(config, groups=with_choice(placed, settings.active, settings.selection))
        kept: TeacherBlocks | None = None
        source: DenseTeacher | ShallowTeacher = teacher
        if settings.baseline == "depth_pruning":
            kept = kept_blocks(teacher.dims, config.groups, found.blocks)
            source = ShallowTeacher(teacher, kept)
            config = shallow(config, source.dims, kept)
        block_routers = _block_routers(settings, config, calibration, found)
        modulations = _modulations(source, config, calibration)
        with tqdm(total=teacher.size, desc="Converting", unit="B", unit_scale=True) as bar:
            config = convert_file(
                source,
                settings.out,
                config,
                _planner(settings, config, kept, calibration, found.ffns),
                modulations=modulations,
                router_bias=settings.recipe.router == "ridge",
                expert_mean=settings.recipe.mean,
                block_routers=block_routers,
                progress=bar.update,
            )
    if calibration is not None and settings.folder is None:
        shutil.rmtree(settings.calibration_folder)
    if modulations is not None:
        found.modulations.update(modulations.errors)
    tell(found, config, settings.out, report)
    file = settings.report_file or settings.out.with_name(f"{settings.out.name}.report.json")
    write_report(found, config, file, report)
    return config


def shallow(config: FluxMoEConfig, dims: FluxDims, kept: TeacherBlocks) -> FluxMoEConfig:
    """The configuration of a student with the kept blocks alone: their FFNs, no groups, which blocks they were, and
    whose outputs they are to give."""
    ffns = {
        name: config.ffns[source] for name in all_ffn_names(dims) if (source := teacher_name(name, kept)) in config.ffns
    }
    blocks = {"teacher_blocks": kept, "teacher_outputs": outputs_of(config.groups, kept)}
    return replace(config, dims=dims, ffns=ffns, groups=(), provenance=config.provenance | blocks)


# What is asked of the teacher


def _calibration(
    settings: ConversionSettings,
    teacher: DenseTeacher,
    config: FluxMoEConfig,
    data: DataSource,
) -> Calibration:
    from tqdm import tqdm

    device = settings.place

    def load() -> FluxTransformer2DModel:
        from d2m_model.hosts.diffusers import load_transformer

        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_transformer(settings.teacher, dtype, device)
        if device.type != "cpu":
            model.enable_gradient_checkpointing()
        return model

    calibration = CalibrationSettings(
        batches=settings.batches,
        batch_size=settings.batch_size,
        tokens=settings.tokens,
        taylor=settings.taylor,
        seed=settings.recipe.seed,
    )
    identity = [
        f"{file.absolute()}, {file.stat().st_size} bytes, modified {file.stat().st_mtime_ns}" for file in teacher.files
    ]
    with tqdm(total=settings.batches, desc="Calibration", unit="batch") as bar:

        def progress(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

        return calibrate(
            load,
            teacher.dims,
            list(config.ffns),
            data,
            calibration,
            settings.calibration_folder,
            "; ".join(identity),
            progress,
        )


def _block_routers(
    settings: ConversionSettings, config: FluxMoEConfig, calibration: Calibration | None, report: Report
) -> dict[str, Tensor]:
    """The tensors of all groups, by their names in the file. Fills the report's groups."""
    tensors: dict[str, Tensor] = {}
    for index, group in enumerate(config.groups):
        name, seed = f"block_groups.{index}", settings.recipe.seed
        if calibration is None:
            routers = random_block_routers_of(name, group, config.dims.hidden_size, seed)
        else:
            try:
                routers, report.groups[name] = plan_block_routers(
                    name, group, calibration.group(group), settings.block_router, seed
                )
            except ValueError as error:
                raise UserError(f"{name}: {error} Calibrate with more batches or larger ones.") from None
        tensors |= {f"{name}.router_x.weight": routers.x_MH, f"{name}.router_y.weight": routers.y_MH}
    return tensors


def _modulations(
    teacher: DenseTeacher | ShallowTeacher, config: FluxMoEConfig, calibration: Calibration | None
) -> FittedModulations | None:
    if config.adaln_rank is None:
        return None
    names = [name for name in dense_shapes(config.dims) if name.endswith(("_mod.lin.weight", ".modulation.lin.weight"))]
    moments = VecMoments.unknown(config.dims.hidden_size) if calibration is None else calibration.moments()
    return FittedModulations(moments, map(teacher.tensor, names), config.adaln_rank)


def _planner(
    settings: ConversionSettings,
    config: FluxMoEConfig,
    kept: TeacherBlocks | None,
    calibration: Calibration | None,
    reports: dict[str, FFNReport],
) -> Callable[[str, FFNWeights], FFNPlan]:
    def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
        recipe, layout = settings.recipe, config.ffns[ffn]
        if config.top_k == 0:
            recipe = replace(recipe, top_k=0)  # MLP pruning: the refit is of the shared expert alone
        source = ffn if kept is None else teacher_name(ffn, kept)
        if calibration is not None and settings.taylor:
            importance_N = calibration.importance(source)
        else:
            importance_N = weight_norm_importance(weights.up_NH, weights.up_bias_N, weights.down_HN)
        if calibration is None:
            return plan_without_data(ffn, weights, layout, importance_N, recipe)
        inputs_TH = calibration.inputs(source).to(settings.place)
        planned, reports[ffn] = plan_with_data(ffn, weights, layout, importance_N, inputs_TH, recipe)
        return planned

    return plan

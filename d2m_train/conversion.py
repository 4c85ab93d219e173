"""A dense FLUX.1 becomes a FLUX-MoE without training: the `convert` command and the first stage of a distillation.

`convert` asks the teacher (calibration, if there are data), decides, and streams the file; `settings_of` says of a run
what its first stage is to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from d2m_model import VERSION
from d2m_model.config import (
    FluxMoEConfig,
    Gate,
    PresetName,
    adaln_rank_of,
    paper_layout,
    preset_groups,
    preset_layouts,
)
from d2m_model.conversion.adaln import FittedModulations, VecMoments
from d2m_model.conversion.convert import convert_file, describe_teacher, refuse_same_file
from d2m_model.conversion.ffn import FFNReport, Recipe, plan_with_data, plan_without_data
from d2m_model.conversion.importance import weight_norm_importance
from d2m_model.conversion.plan import FFNPlan, FFNWeights
from d2m_model.keys import dense_shapes
from d2m_model.teacher import DenseTeacher, open_teacher
from d2m_model.tensor_file import CheckpointError

from . import UserError
from .calibrate import Calibration, CalibrationSettings, calibrate
from .conversion_report import Report, tell, write_report
from .data.batch import DataSource

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from .run_config import RunConfig

Importance = Literal["taylor", "weight-norm"]
LoadTeacher = Callable[[], "FluxTransformer2DModel"]


@dataclass(kw_only=True, slots=True, frozen=True)
class ConversionSettings:
    """What is to be made of which teacher, and how.

    teacher      what open_teacher reads; its weights go into the file
    adaln_rank   of the AdaLN compression: `preset` is hidden size / 12, None leaves the modulations dense
    importance   `taylor` needs data, as `recipe.needs_inputs` does
    tokens       inputs kept of every FFN in calibration, in all
    device       of calibration and planning; None: cuda if there is one, else cpu
    folder       where the calibration is kept, and continued; None: beside `out` until that is written
    report_file  the JSON report; None: beside `out`
    fused        LoRAs in the teacher that `load_teacher` gives, with their strengths: part of the calibration's identity
    """

    teacher: Path
    out: Path
    preset: PresetName
    recipe: Recipe
    importance: Importance
    adaln_rank: int | Literal["preset"] | None
    batches: int
    batch_size: int
    tokens: int
    device: str | None = None
    folder: Path | None = None
    report_file: Path | None = None
    fused: str = ""

    @property
    def calibration_folder(self) -> Path:
        return self.folder or self.out.with_name(f"{self.out.name}.calibration")

    @property
    def place(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def settings_of(run: RunConfig, teacher_path: Path, out: Path, folder: Path | None) -> ConversionSettings:
    """Of a run's stage `convert`: the file `out` of the teacher at `teacher_path`, its calibration kept in `folder`."""
    method = run.convert
    return ConversionSettings(
        teacher=teacher_path,
        out=out,
        preset=run.student.preset,
        recipe=Recipe(
            experts=method.experts,
            router=method.router,
            mean=method.mean,
            refit=method.refit,
            top_k=run.student.top_k,
            seed=run.seed,
        ),
        importance=method.importance,
        adaln_rank=None if run.student.adaln_rank == "none" else run.student.adaln_rank,
        batches=method.batches,
        batch_size=method.batch_size,
        tokens=method.tokens,
        folder=folder,
        fused=", ".join(f"{lora.path.absolute()} at {lora.strength:g}" for lora in run.teacher.loras),
    )


def convert(
    settings: ConversionSettings,
    data: DataSource | None = None,
    *,
    load_teacher: LoadTeacher | None = None,
    report: Callable[[str], object] = print,
) -> FluxMoEConfig:
    """Write `settings.out` and its report; give its configuration. A calibration that was interrupted is continued.

    `data`: for calibration; without, the weights alone decide. `load_teacher`: the dense teacher for calibration,
    instead of the one in `settings.teacher`. `report` hears sentences for the user. Raises UserError for settings that
    cannot be met, and CheckpointError for a teacher or a target that cannot be used.
    """
    from tqdm import tqdm

    _check(settings, data)
    with open_teacher(settings.teacher) as teacher:
        refuse_same_file(teacher.files, settings.out)
        for note in teacher.notes:
            report(note)
        config = _config(settings, teacher, data)
        calibration = None if data is None else _calibration(settings, teacher, config, data, load_teacher)
        modulations = _modulations(teacher, config, calibration)
        reports: dict[str, FFNReport] = {}
        with tqdm(total=teacher.size, desc="Converting", unit="B", unit_scale=True) as bar:
            config = convert_file(
                teacher,
                settings.out,
                config,
                _planner(settings, config, calibration, reports),
                modulations=modulations,
                router_bias=settings.recipe.router == "ridge",
                expert_mean=settings.recipe.mean,
                progress=bar.update,
            )
    if calibration is not None and settings.folder is None:
        shutil.rmtree(settings.calibration_folder)
    found = Report(config=config, ffns=reports, modulations={} if modulations is None else modulations.errors)
    tell(found, settings.out, report)
    write_report(found, settings.report_file or settings.out.with_name(f"{settings.out.name}.report.json"), report)
    return config


def _check(settings: ConversionSettings, data: DataSource | None) -> None:
    """Before minutes of calibration rather than after."""
    recipe = settings.recipe
    if data is None and (recipe.needs_inputs or settings.importance == "taylor"):
        raise UserError(
            "This conversion asks the teacher itself (taylor, coactivation, ridge, mean or refit): give data."
        )
    if settings.preset != "L":
        raise UserError(
            f"Preset {settings.preset} comes with the block groups, in a later version; this one converts to L."
        )
    folder = settings.out.absolute().parent
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Create it, or write elsewhere.")


def _config(settings: ConversionSettings, teacher: DenseTeacher, data: DataSource | None) -> FluxMoEConfig:
    recipe, hidden_size = settings.recipe, teacher.dims.hidden_size
    experts = paper_layout(hidden_size).experts
    if not 1 <= recipe.top_k <= experts:
        raise UserError(f"--top-k is {recipe.top_k}; expected 1 to {experts}, the number of experts.")
    rank = adaln_rank_of(hidden_size) if settings.adaln_rank == "preset" else settings.adaln_rank
    if rank is not None and rank > hidden_size:
        raise UserError(f"--adaln-rank is {rank}; expected 1 to {hidden_size}, the hidden size.")
    how: dict[str, object] = {
        "tool": f"ComfyUI-Dense2MoE {VERSION}",
        "preset": settings.preset,
        "importance": settings.importance,
        **asdict(recipe),
    }
    if data is not None:
        how["data"] = {"name": data.name, "batches": settings.batches, "batch_size": settings.batch_size}
    return FluxMoEConfig(
        dims=teacher.dims,
        ffns=preset_layouts(teacher.dims),
        groups=preset_groups(settings.preset, teacher.dims),
        gate=Gate(mode="sum", scale=1.0),
        top_k=recipe.top_k,
        adaln_rank=rank,
        split_only=rank is None and not recipe.refit,
        teacher=describe_teacher(teacher),
        provenance=how,
    )


# What is asked of the teacher


def _calibration(
    settings: ConversionSettings,
    teacher: DenseTeacher,
    config: FluxMoEConfig,
    data: DataSource,
    load_teacher: LoadTeacher | None,
) -> Calibration:
    from tqdm import tqdm

    device = settings.place

    def load() -> FluxTransformer2DModel:
        from d2m_model.hosts.diffusers import load_transformer

        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = load_transformer(settings.teacher, dtype, device) if load_teacher is None else load_teacher()
        if device.type != "cpu":
            model.enable_gradient_checkpointing()
        return model

    calibration = CalibrationSettings(
        batches=settings.batches,
        batch_size=settings.batch_size,
        tokens=settings.tokens,
        taylor=settings.importance == "taylor",
        seed=settings.recipe.seed,
    )
    identity = [
        f"{file.absolute()}, {file.stat().st_size} bytes, modified {file.stat().st_mtime_ns}" for file in teacher.files
    ]
    if settings.fused:
        identity.append(f"with {settings.fused}")
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


def _modulations(
    teacher: DenseTeacher, config: FluxMoEConfig, calibration: Calibration | None
) -> FittedModulations | None:
    if config.adaln_rank is None:
        return None
    names = [name for name in dense_shapes(config.dims) if name.endswith(("_mod.lin.weight", ".modulation.lin.weight"))]
    moments = VecMoments.unknown(config.dims.hidden_size) if calibration is None else calibration.moments()
    return FittedModulations(moments, map(teacher.tensor, names), config.adaln_rank)


def _planner(
    settings: ConversionSettings,
    config: FluxMoEConfig,
    calibration: Calibration | None,
    reports: dict[str, FFNReport],
) -> Callable[[str, FFNWeights], FFNPlan]:
    def importance(ffn: str, weights: FFNWeights) -> Tensor:
        if calibration is not None and settings.importance == "taylor":
            return calibration.importance(ffn)
        return weight_norm_importance(weights.up_NH, weights.up_bias_N, weights.down_HN)

    def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
        importance_N, recipe = importance(ffn, weights), settings.recipe
        if calibration is None:
            return plan_without_data(ffn, weights, config.ffns[ffn], importance_N, recipe)
        inputs_TH = calibration.inputs(ffn).to(settings.place)
        planned, reports[ffn] = plan_with_data(ffn, weights, config.ffns[ffn], importance_N, inputs_TH, recipe)
        return planned

    return plan

"""What a conversion is to make, and the configuration of the file that comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from d2m_model import VERSION
from d2m_model.config import (
    BlockGroup,
    FluxDims,
    FluxMoEConfig,
    Gate,
    PresetName,
    Selection,
    Teacher,
    adaln_rank_of,
    paper_layout,
    preset_groups,
    preset_layouts,
)
from d2m_model.conversion.block_routers import BlockRouterInit
from d2m_model.conversion.ffn import Recipe
from d2m_model.conversion.groups import parse_groups, with_choice

from . import UserError

if TYPE_CHECKING:
    from .run_config import RunConfig

Importance = Literal["taylor", "weight-norm"]


@dataclass(kw_only=True, slots=True, frozen=True)
class ConversionSettings:
    """What is to be made of which teacher, and how.

    teacher       what open_teacher reads; its weights go into the file
    groups        the preset's block groups; as many and as large ones where blocks change least (`auto`, needs data);
                  or these, as groups.SYNTAX says
    active        blocks of a group that run, where `groups` does not say
    block_router  `ridge` needs data
    importance    `taylor` needs data, as `recipe.needs_inputs` does
    adaln_rank    of the AdaLN compression: `preset` is hidden size / 12, None leaves the modulations dense
    tokens        inputs kept of every FFN in calibration, in all
    device        of calibration and planning; None: cuda if there is one, else cpu
    folder        where the calibration is kept, and continued; None: beside `out` until that is written
    report_file   the JSON report; None: beside `out`
    fused         LoRAs in the teacher that `load_teacher` gives, with their strengths: the calibration is of them too
    """

    teacher: Path
    out: Path
    preset: PresetName
    groups: Literal["preset", "auto"] | tuple[str, ...]
    active: int
    selection: Selection
    block_router: BlockRouterInit
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

    @property
    def needs_data(self) -> bool:
        return (
            self.recipe.needs_inputs
            or self.importance == "taylor"
            or self.groups == "auto"
            or self.block_router == "ridge"
        )


def settings_of(run: RunConfig, teacher_path: Path, out: Path, folder: Path | None) -> ConversionSettings:
    """Of a run's stage `convert`: the file `out` of the teacher at `teacher_path`, its calibration kept in `folder`."""
    method, student = run.convert, run.student
    return ConversionSettings(
        teacher=teacher_path,
        out=out,
        preset=student.preset,
        groups=student.groups,
        active=student.active,
        selection=student.selection,
        block_router=method.block_router,
        recipe=Recipe(
            experts=method.experts,
            router=method.router,
            mean=method.mean,
            refit=method.refit,
            top_k=student.top_k,
            seed=run.seed,
        ),
        importance=method.importance,
        adaln_rank=None if student.adaln_rank == "none" else student.adaln_rank,
        batches=method.batches,
        batch_size=method.batch_size,
        tokens=method.tokens,
        folder=folder,
        fused=", ".join(f"{lora.path.absolute()} at {lora.strength:g}" for lora in run.teacher.loras),
    )


def groups_of(settings: ConversionSettings, dims: FluxDims) -> tuple[BlockGroup, ...]:
    """The block groups of a file; for `auto` the preset's, until calibration has said where they go.

    Raises UserError for `auto` with a preset that has none, and ConfigError for groups that cannot be.
    """
    if isinstance(settings.groups, tuple):
        return parse_groups(settings.groups, settings.active, settings.selection)
    if settings.groups == "auto" and settings.preset == "L":
        raise UserError("Groups `auto` places the groups of a preset, and L has none; take M, S or XS, or list them.")
    return with_choice(preset_groups(settings.preset, dims), settings.active, settings.selection)


def config_of(settings: ConversionSettings, dims: FluxDims, teacher: Teacher, data_name: str | None) -> FluxMoEConfig:
    """What the file's configuration will be, but for the teacher's hash. Raises UserError or ConfigError."""
    recipe = settings.recipe
    experts = paper_layout(dims.hidden_size).experts
    if not 1 <= recipe.top_k <= experts:
        raise UserError(f"--top-k is {recipe.top_k}; expected 1 to {experts}, the number of experts.")
    rank = adaln_rank_of(dims.hidden_size) if settings.adaln_rank == "preset" else settings.adaln_rank
    if rank is not None and rank > dims.hidden_size:
        raise UserError(f"--adaln-rank is {rank}; expected 1 to {dims.hidden_size}, the hidden size.")
    groups = groups_of(settings, dims)
    how: dict[str, object] = {
        "tool": f"ComfyUI-Dense2MoE {VERSION}",
        "preset": settings.preset,
        "importance": settings.importance,
        **asdict(recipe),
    }
    if groups:
        listed = isinstance(settings.groups, tuple)
        how |= {"groups": "listed" if listed else settings.groups, "block_router": settings.block_router}
    if data_name is not None:
        how["data"] = {"name": data_name, "batches": settings.batches, "batch_size": settings.batch_size}
    return FluxMoEConfig(
        dims=dims,
        ffns=preset_layouts(dims),
        groups=groups,
        gate=Gate(mode="sum", scale=1.0),
        top_k=recipe.top_k,
        adaln_rank=rank,
        split_only=rank is None and not recipe.refit,
        teacher=teacher,
        provenance=how,
    )

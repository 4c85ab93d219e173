"""What a conversion is to make, and the configuration of the file that comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from d2m_model import VERSION
from d2m_model.config import (
    BlockGroup,
    CapacityRouter,
    FFNLayout,
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
FFNKind = Literal["moe", "dense"]
Baseline = Literal["none", "mlp_pruning", "depth_pruning"]
TokenRouter = Literal["top_k", "capacity"]


@dataclass(kw_only=True, slots=True, frozen=True)
class ConversionSettings:
    """What is to be made of which teacher, and how.

    teacher       what open_teacher reads; its weights go into the file
    groups        the preset's block groups; as many and as large ones where blocks change least (`auto`, needs data);
                  or these, as groups.SYNTAX says
    active        blocks of a group that run, where `groups` does not say
    block_router  `ridge` needs data
    ffns          `moe`: those of preset L; `dense`: the teacher's, for block groups or depth pruning alone (Table 3)
    baseline      `mlp_pruning`: what top_k experts would be is part of the shared expert, and no other expert runs (Table
                  2); `depth_pruning`: of each group the blocks that change most are kept, no others (Table 3; needs data)
    router        `capacity`: DiffMoE's, with a predictor of `predictor_width` (needs data)
    importance    `taylor` needs data, as `recipe.needs_inputs` does
    adaln_rank    of the AdaLN compression: `preset` is hidden size / 12, None leaves the modulations dense
    tokens        inputs kept of every FFN in calibration, in all
    device        of calibration and planning; None: cuda if there is one, else cpu
    folder        where the calibration is kept, and continued; None: beside `out` until that is written
    report_file   the JSON report; None: beside `out`
    """

    teacher: Path
    out: Path
    preset: PresetName
    groups: Literal["preset", "auto"] | tuple[str, ...]
    active: int
    selection: Selection
    block_router: BlockRouterInit
    ffns: FFNKind
    baseline: Baseline
    router: TokenRouter
    predictor_width: int
    recipe: Recipe
    importance: Importance
    adaln_rank: int | Literal["preset"] | None
    batches: int
    batch_size: int
    tokens: int
    device: str | None = None
    folder: Path | None = None
    report_file: Path | None = None

    @property
    def calibration_folder(self) -> Path:
        return self.folder or self.out.with_name(f"{self.out.name}.calibration")

    @property
    def place(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def taylor(self) -> bool:
        return self.importance == "taylor" and self.ffns == "moe"

    def resolved(self) -> ConversionSettings:
        """With the recipe that the baseline and the router want. Raises UserError for what does not go together."""
        recipe = self.recipe
        if self.baseline == "depth_pruning" and self.preset == "L" and not isinstance(self.groups, tuple):
            raise UserError("Depth pruning leaves blocks of the preset's groups out, and L has none; take M, S or XS.")
        if self.baseline == "mlp_pruning":
            if self.ffns == "dense" or self.router == "capacity":
                what = "dense FFNs" if self.ffns == "dense" else "a capacity router"
                raise UserError(f"MLP pruning is of FFNs without routers; leave out one of it and {what}.")
            recipe = replace(recipe, experts="dealt", router="random", mean=False)
        if self.ffns == "dense":
            if self.router == "capacity":
                raise UserError("A capacity router needs experts; the FFNs are to stay dense.")
            recipe = replace(recipe, experts="dealt", router="random", mean=False, refit=False)
        if self.router == "capacity":
            recipe = replace(recipe, predictor_width=self.predictor_width)
        return replace(self, recipe=recipe)

    def check_data(self) -> None:
        """Raises UserError naming the first thing that needs data, for settings that are to do without."""
        needs = {
            "importance taylor": self.taylor,
            "experts coactivation": self.recipe.experts == "coactivation",
            "router ridge": self.recipe.router == "ridge",
            "mean": self.recipe.mean,
            "refit": self.recipe.refit,
            "router capacity": self.router == "capacity",
            "groups auto": self.groups == "auto",
            "block router ridge": self.block_router == "ridge",
            "depth pruning": self.baseline == "depth_pruning",
        }
        if wanted := [name for name, needed in needs.items() if needed]:
            raise UserError(f"This conversion asks the teacher itself ({', '.join(wanted)}): give data.")


def settings_of(run: RunConfig, teacher_path: Path, out: Path, folder: Path | None) -> ConversionSettings:
    """Of a run's stage `convert`: the file `out` of the teacher at `teacher_path`, its calibration kept in `folder`.

    The teacher's LoRAs are fused in that file already, if it has any.
    """
    method, student = run.convert, run.student
    return ConversionSettings(
        teacher=teacher_path,
        out=out,
        preset=student.preset,
        groups=student.groups,
        active=student.active,
        selection=student.selection,
        block_router=method.block_router,
        ffns=student.ffns,
        baseline=student.baseline,
        router=student.router,
        predictor_width=student.predictor_width,
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
        device=method.device,
        folder=folder,
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
    """The file's configuration, but for the teacher's hash; of resolved settings. Raises UserError or ConfigError.

    For groups `auto` and depth pruning it is what `dims` and the preset say, until calibration has told which blocks.
    """
    recipe = settings.recipe
    most = paper_layout(dims.hidden_size).experts - (settings.baseline == "mlp_pruning")
    if not 1 <= recipe.top_k <= most:
        raise UserError(f"--top-k is {recipe.top_k}; expected 1 to {most}, the number of experts.")
    rank = adaln_rank_of(dims.hidden_size) if settings.adaln_rank == "preset" else settings.adaln_rank
    if rank is not None and rank > dims.hidden_size:
        raise UserError(f"--adaln-rank is {rank}; expected 1 to {dims.hidden_size}, the hidden size.")
    width = settings.recipe.predictor_width
    return FluxMoEConfig(
        dims=dims,
        ffns=_layouts(settings, dims),
        groups=groups_of(settings, dims),
        gate=Gate(mode="sum", scale=1.0),
        top_k=0 if settings.baseline == "mlp_pruning" or settings.ffns == "dense" else recipe.top_k,
        adaln_rank=rank,
        split_only=rank is None and not recipe.refit and settings.baseline != "depth_pruning",
        teacher=teacher,
        capacity_router=None if width is None else CapacityRouter(capacity=float(recipe.top_k), width=width),
        provenance=_provenance(settings, data_name),
    )


def _layouts(settings: ConversionSettings, dims: FluxDims) -> dict[str, FFNLayout]:
    if settings.ffns == "dense":
        return {}
    layouts = preset_layouts(dims)
    if settings.baseline != "mlp_pruning":
        return layouts
    paper, top_k = paper_layout(dims.hidden_size), settings.recipe.top_k
    # r_a = r_s + k r_n, all of it shared; the rest is in experts that never run, as the file has room for all neurons.
    pruned = replace(paper, shared=paper.shared + top_k * paper.width, experts=paper.experts - top_k)
    return dict.fromkeys(layouts, pruned)


def _provenance(settings: ConversionSettings, data_name: str | None) -> dict[str, object]:
    how: dict[str, object] = {"tool": f"ComfyUI-Dense2MoE {VERSION}", "preset": settings.preset}
    if settings.ffns == "moe":
        how |= {"importance": settings.importance, **asdict(settings.recipe)}
    if settings.baseline != "none":
        how["baseline"] = settings.baseline
    if settings.preset != "L" or settings.groups != "preset":
        how["groups"] = list(settings.groups) if isinstance(settings.groups, tuple) else settings.groups
        how["block_router"] = settings.block_router
    if data_name is not None:
        how["data"] = {"name": data_name, "batches": settings.batches, "batch_size": settings.batch_size}
    return how

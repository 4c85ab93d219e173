"""Options of a conversion without training, and the configuration of the file that it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

from .. import VERSION
from ..config import (
    BlockGroup,
    FFNLayout,
    FluxDims,
    FluxMoEConfig,
    PresetName,
    Selection,
    Teacher,
    adaln_rank_of,
    paper_layout,
    preset_groups,
    preset_layouts,
)
from ..routers import KINDS, Gate, TopKRouter
from ..stand_ins import stand_in_rank_of
from .block_routers import BlockRouterInit
from .ffn import Recipe
from .groups import parse_groups, with_choice
from .options import Baseline, FFNKind, Importance, needing_data

AnyMethod = TypeVar("AnyMethod", bound="Method")


class MethodError(ValueError):
    """Options that cannot be met or combined; the message says which."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Method:
    """How a dense FLUX becomes a FLUX-MoE without training.

    groups        `preset`: the preset's block groups; `auto`: groups of the same number and sizes, where blocks change
                  least (needs data); or a list in the form of groups.SYNTAX
    active        active blocks per group, unless `groups` gives the number
    block_router  `ridge` needs data
    stand_ins     of the blocks of groups, where they are skipped; need data
    ffns          `moe`: those of preset L; `dense`: the teacher's, for block groups or depth pruning alone (Table 3)
    baseline      `mlp_pruning`: the shared expert is larger by top_k experts, and no routed expert runs (Table 2);
                  `depth_pruning`: only the blocks of each group that change most are kept (Table 3; needs data)
    router        kind of token router, see routers.KINDS; `capacity` has a predictor of `predictor_width` (needs data)
    importance    `taylor` (a backward pass) and `activation` need data, as `recipe.needs_inputs` does
    adaln_rank    rank of the AdaLN compression: `preset` is hidden size / 12, None leaves the modulations dense
    """

    preset: PresetName
    groups: Literal["preset", "auto"] | tuple[str, ...]
    active: int
    selection: Selection
    block_router: BlockRouterInit
    stand_ins: bool
    ffns: FFNKind
    baseline: Baseline
    router: str
    predictor_width: int
    recipe: Recipe
    importance: Importance
    adaln_rank: int | Literal["preset"] | None

    @property
    def taylor(self) -> bool:
        return self.importance == "taylor" and self.ffns == "moe"

    @property
    def needs(self) -> list[str]:
        """Options that need calibration data, for people."""
        recipe = self.recipe
        values = {
            "groups": self.groups,
            "router_kind": self.router,
            "baseline": self.baseline,
            "importance": self.importance if self.ffns == "moe" else None,
            "experts": recipe.experts,
            "router": recipe.router,
            "block_router": self.block_router,
            "stand_ins": self.stand_ins,
            "mean": recipe.mean,
            "refit": recipe.refit,
        }
        return [name if value is True else f"{name} {value}" for name, value in needing_data(values)]

    def rank(self, dims: FluxDims) -> int | None:
        """Return the rank of the AdaLN compression for a teacher with these dimensions, or None."""
        return adaln_rank_of(dims.hidden_size) if self.adaln_rank == "preset" else self.adaln_rank

    def most_experts(self, dims: FluxDims) -> int:
        """Return the largest possible recipe.top_k."""
        return paper_layout(dims.hidden_size).experts - (self.baseline == "mlp_pruning")


def resolved(method: AnyMethod) -> AnyMethod:
    """Return the method with the recipe that its baseline and router need. Raises MethodError for a contradiction."""
    recipe, kind = method.recipe, KINDS[method.router]
    other_router = kind is not TopKRouter
    if method.baseline == "depth_pruning" and method.preset == "L" and not isinstance(method.groups, tuple):
        raise MethodError("Depth pruning drops blocks of the preset's groups, and L has none; take M, S or XS.")
    if method.baseline == "mlp_pruning":
        if method.ffns == "dense" or other_router:
            other = "dense FFNs" if method.ffns == "dense" else kind.named
            raise MethodError(f"MLP pruning is for FFNs without routers; leave out either it or {other}.")
        recipe = replace(recipe, experts="dealt", router="random", mean=False)
    if method.ffns == "dense":
        if other_router:
            raise MethodError(
                f"{kind.named.capitalize()} needs experts, but the FFNs stay dense; change one of the two options."
            )
        recipe = replace(recipe, experts="dealt", router="random", mean=False, refit=False)
    router = kind.for_conversion(top_k=recipe.top_k, predictor_width=method.predictor_width)
    return replace(method, recipe=replace(recipe, token_router=router))


def groups_of(method: Method, dims: FluxDims) -> tuple[BlockGroup, ...]:
    """Return the file's block groups; for `auto` the preset's, until a calibration places them.

    Raises MethodError for `auto` with a preset that has none, and ConfigError for impossible groups.
    """
    if isinstance(method.groups, tuple):
        return parse_groups(method.groups, method.active, method.selection)
    if method.groups == "auto" and method.preset == "L":
        raise MethodError("Groups `auto` places the groups of a preset, and L has none; take M, S or XS, or list them.")
    return with_choice(preset_groups(method.preset, dims), method.active, method.selection)


def new_config(method: Method, dims: FluxDims, teacher: Teacher, data: dict[str, object] | None) -> FluxMoEConfig:
    """Return the file's configuration for a resolved method, without the teacher's hash.

    `data` describes the calibration data, if any, for the file's provenance. For groups `auto` and depth pruning the
    blocks are preliminary until a calibration chooses them. Raises MethodError or ConfigError.
    """
    recipe, rank, groups = method.recipe, method.rank(dims), groups_of(method, dims)
    return FluxMoEConfig(
        dims=dims,
        ffns=_layouts(method, dims),
        groups=groups,
        gate=Gate(mode="sum", scale=1.0),
        top_k=0 if method.baseline == "mlp_pruning" or method.ffns == "dense" else recipe.top_k,
        adaln_rank=rank,
        split_only=rank is None and not recipe.refit and method.baseline != "depth_pruning",
        teacher=teacher,
        router=recipe.token_router,
        stand_in_rank=stand_in_rank_of(dims.hidden_size) if method.stand_ins and groups else None,
        provenance=_provenance(method, data),
    )


def _layouts(method: Method, dims: FluxDims) -> dict[str, FFNLayout]:
    if method.ffns == "dense":
        return {}
    layouts = preset_layouts(dims)
    if method.baseline != "mlp_pruning":
        return layouts
    paper, top_k = paper_layout(dims.hidden_size), method.recipe.top_k
    # r_a = r_s + k r_n neurons are shared. The others go to experts that never run: the file keeps every neuron.
    pruned = replace(paper, shared=paper.shared + top_k * paper.width, experts=paper.experts - top_k)
    return dict.fromkeys(layouts, pruned)


def _provenance(method: Method, data: dict[str, object] | None) -> dict[str, object]:
    how: dict[str, object] = {"tool": f"ComfyUI-Dense2MoE {VERSION}", "preset": method.preset}
    if method.ffns == "moe":
        recipe = asdict(method.recipe)
        del recipe["token_router"]
        how |= {
            "importance": method.importance,
            **recipe,
            "predictor_width": None,
            **method.recipe.token_router.provenance,
        }
    if method.baseline != "none":
        how["baseline"] = method.baseline
    if method.preset != "L" or method.groups != "preset":
        how["groups"] = list(method.groups) if isinstance(method.groups, tuple) else method.groups
        how["block_router"] = method.block_router
    if data is not None:
        how["data"] = data
    return how

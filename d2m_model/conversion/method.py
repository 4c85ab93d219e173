"""What a conversion is to make of a dense FLUX and how, and the configuration of the file that comes of it."""

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
from .block_routers import BlockRouterInit
from .ffn import Recipe
from .groups import parse_groups, with_choice
from .options import Baseline, FFNKind, Importance, needing_data

AnyMethod = TypeVar("AnyMethod", bound="Method")


class MethodError(ValueError):
    """Options that cannot be met, or not together; the message says which."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Method:
    """How a dense FLUX becomes a FLUX-MoE without training.

    groups        the preset's block groups; as many and as large ones where blocks change least (`auto`, needs data);
                  or these, as groups.SYNTAX says
    active        blocks of a group that run, where `groups` does not say
    block_router  `ridge` needs data
    ffns          `moe`: those of preset L; `dense`: the teacher's, for block groups or depth pruning alone (Table 3)
    baseline      `mlp_pruning`: what top_k experts would be is part of the shared expert, and no other expert runs (Table
                  2); `depth_pruning`: of each group the blocks that change most are kept, no others (Table 3; needs data)
    router        kind of token router, see routers.KINDS; `capacity` has a predictor of `predictor_width` (needs data)
    importance    `taylor` (a backward pass) and `activation` need data, as `recipe.needs_inputs` does
    adaln_rank    of the AdaLN compression: `preset` is hidden size / 12, None leaves the modulations dense
    """

    preset: PresetName
    groups: Literal["preset", "auto"] | tuple[str, ...]
    active: int
    selection: Selection
    block_router: BlockRouterInit
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
            "mean": recipe.mean,
            "refit": recipe.refit,
        }
        return [name if value is True else f"{name} {value}" for name, value in needing_data(values)]

    def rank(self, dims: FluxDims) -> int | None:
        """Of the AdaLN compression of a teacher of these dimensions."""
        return adaln_rank_of(dims.hidden_size) if self.adaln_rank == "preset" else self.adaln_rank

    def most_experts(self, dims: FluxDims) -> int:
        """The largest recipe.top_k."""
        return paper_layout(dims.hidden_size).experts - (self.baseline == "mlp_pruning")


def resolved(method: AnyMethod) -> AnyMethod:
    """With the recipe that the baseline and the router want. Raises MethodError for what does not go together."""
    recipe, kind = method.recipe, KINDS[method.router]
    other_router = kind is not TopKRouter
    if method.baseline == "depth_pruning" and method.preset == "L" and not isinstance(method.groups, tuple):
        raise MethodError("Depth pruning leaves blocks of the preset's groups out, and L has none; take M, S or XS.")
    if method.baseline == "mlp_pruning":
        if method.ffns == "dense" or other_router:
            what = "dense FFNs" if method.ffns == "dense" else kind.named
            raise MethodError(f"MLP pruning is of FFNs without routers; leave out one of it and {what}.")
        recipe = replace(recipe, experts="dealt", router="random", mean=False)
    if method.ffns == "dense":
        if other_router:
            raise MethodError(f"{kind.named.capitalize()} needs experts; the FFNs are to stay dense.")
        recipe = replace(recipe, experts="dealt", router="random", mean=False, refit=False)
    router = kind.for_conversion(top_k=recipe.top_k, predictor_width=method.predictor_width)
    return replace(method, recipe=replace(recipe, token_router=router))


def groups_of(method: Method, dims: FluxDims) -> tuple[BlockGroup, ...]:
    """The block groups of a file; for `auto` the preset's, until calibration has said where they go.

    Raises MethodError for `auto` with a preset that has none, and ConfigError for groups that cannot be.
    """
    if isinstance(method.groups, tuple):
        return parse_groups(method.groups, method.active, method.selection)
    if method.groups == "auto" and method.preset == "L":
        raise MethodError("Groups `auto` places the groups of a preset, and L has none; take M, S or XS, or list them.")
    return with_choice(preset_groups(method.preset, dims), method.active, method.selection)


def new_config(method: Method, dims: FluxDims, teacher: Teacher, data: dict[str, object] | None) -> FluxMoEConfig:
    """The file's configuration, but for the teacher's hash; of a resolved method. Raises MethodError or ConfigError.

    `data` says for the file's provenance what it was calibrated with, if it was. For groups `auto` and depth pruning it
    is what `dims` and the preset say, until calibration has told which blocks.
    """
    recipe, rank = method.recipe, method.rank(dims)
    return FluxMoEConfig(
        dims=dims,
        ffns=_layouts(method, dims),
        groups=groups_of(method, dims),
        gate=Gate(mode="sum", scale=1.0),
        top_k=0 if method.baseline == "mlp_pruning" or method.ffns == "dense" else recipe.top_k,
        adaln_rank=rank,
        split_only=rank is None and not recipe.refit and method.baseline != "depth_pruning",
        teacher=teacher,
        router=recipe.token_router,
        provenance=_provenance(method, data),
    )


def _layouts(method: Method, dims: FluxDims) -> dict[str, FFNLayout]:
    if method.ffns == "dense":
        return {}
    layouts = preset_layouts(dims)
    if method.baseline != "mlp_pruning":
        return layouts
    paper, top_k = paper_layout(dims.hidden_size), method.recipe.top_k
    # r_a = r_s + k r_n, all of it shared; the rest is in experts that never run, as the file has room for all neurons.
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

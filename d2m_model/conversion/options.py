"""Options of a conversion without training: choices, defaults and help, stated once.

The command line, the YAML sections `student` and `convert`, and the ComfyUI node are made from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..config import PresetName, Selection
from ..routers import KINDS
from ..routers.capacity import PREDICTOR_WIDTH
from .block_routers import BlockRouterInit
from .ffn import Experts, Recipe
from .router_init import RouterInit

Importance = Literal["taylor", "activation", "weight-norm"]
FFNKind = Literal["moe", "dense"]
Baseline = Literal["none", "mlp_pruning", "depth_pruning"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Option:
    """An option and its default.

    without_data  default where there are no calibration data, if it is another one
    choices       allowed values, if they are few
    needs_data    values that need calibration data
    minimum       of a number
    """

    default: Any
    help: str
    without_data: Any = None
    choices: tuple[str, ...] = ()
    needs_data: tuple[Any, ...] = ()
    minimum: int | None = None

    @property
    def depends_on_data(self) -> bool:
        return self.without_data is not None

    def default_for(self, *, calibrated: bool) -> Any:
        """Return the default with or without calibration data."""
        return self.without_data if self.depends_on_data and not calibrated else self.default


OPTIONS: dict[str, Option] = {
    "preset": Option(
        default="L",
        choices=get_args(PresetName),
        help="L: experts in all blocks but the first; M: also groups of double blocks, of which one runs at a time; S and "
        "XS: also groups of single blocks",
    ),
    "groups": Option(
        default="preset",
        needs_data=("auto",),
        help="block groups (Mixture of Blocks): the preset's; as many and as large ones, placed where blocks change their "
        "input least (auto, needs data); or a list such as double:4-6/1,single:10-14/1, first-last/active",
    ),
    "active": Option(default=1, minimum=1, help="blocks of a group that run, where the group does not say it"),
    "selection": Option(
        default="topk",
        choices=get_args(Selection),
        help="how a group chooses: the best blocks (Eq. 5) or the best window of neighbours (Eq. 4)",
    ),
    "router_kind": Option(
        default="top_k",
        choices=tuple(KINDS),
        needs_data=tuple(name for name, kind in KINDS.items() if kind.needs_data),
        help="top_k: every token has top_k experts; capacity: DiffMoE's, top_k experts on average (needs data)",
    ),
    "ffns": Option(
        default="moe",
        choices=get_args(FFNKind),
        help="dense: FFNs stay the teacher's, and only block groups or depth pruning change the model (Table 3)",
    ),
    "baseline": Option(
        default="none",
        choices=get_args(Baseline),
        needs_data=("depth_pruning",),
        help="dense models of the same activated size, for comparison: FFNs pruned to what top_k experts activate (Table "
        "2), or depth pruned to the active blocks of the groups (Table 3; needs data)",
    ),
    "importance": Option(
        default="taylor",
        without_data="weight-norm",
        choices=get_args(Importance),
        needs_data=("taylor", "activation"),
        help="measure by which the shared expert gets the most important neurons",
    ),
    "experts": Option(
        default="coactivation",
        without_data="dealt",
        choices=get_args(Experts),
        needs_data=("coactivation",),
        help="how the other neurons become experts: those that fire together, dealt by importance, or at random as in the "
        "paper",
    ),
    "router": Option(
        default="ridge",
        without_data="centroid",
        choices=get_args(RouterInit),
        needs_data=("ridge",),
        help="how routers are initialised: by regression of the experts' outputs, by the mean row of W1, or at random as in "
        "the paper",
    ),
    "block_router": Option(
        default="ridge",
        without_data="random",
        choices=get_args(BlockRouterInit),
        needs_data=("ridge",),
        help="how routers of block groups are initialised: by regression of the blocks' changes, or at random as in the "
        "paper",
    ),
    "stand_ins": Option(
        default=False,
        needs_data=(True,),
        help="fit a low-rank linear map that stands in for each block of a group where it is skipped",
    ),
    "mean": Option(
        default=True,
        without_data=False,
        needs_data=(True,),
        help="replace experts that are not chosen by their mean output",
    ),
    "refit": Option(
        default=True,
        without_data=False,
        needs_data=(True,),
        help="refit the shared expert's W2 to what is missing at top_k; other values of top_k then fit less well",
    ),
    "adaln_rank": Option(
        default="preset", minimum=1, help="rank of the AdaLN compression; the preset's is hidden size / 12"
    ),
    "predictor_width": Option(default=PREDICTOR_WIDTH, minimum=1, help="width of a capacity router's predictor"),
    "top_k": Option(default=2, minimum=1, help="experts per token"),
    "seed": Option(default=0, help="seed of everything that is drawn at random"),
    "batches": Option(default=32, minimum=1, help="calibration batches"),
    "batch_size": Option(default=8, minimum=1, help="samples in a calibration batch"),
    "tokens": Option(default=8192, minimum=1, help="inputs kept of every FFN, over the whole calibration"),
}


def needing_data(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the options whose values need calibration data, with these values."""
    return [(name, values[name]) for name, option in OPTIONS.items() if values.get(name) in option.needs_data]


def with_defaults(values: Mapping[str, Any], *, calibrated: bool) -> dict[str, Any]:
    """Return all options: the values that are given and not None, and defaults for the others."""
    defaults = {name: option.default_for(calibrated=calibrated) for name, option in OPTIONS.items()}
    return defaults | {name: value for name, value in values.items() if value is not None}


def method_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of method.Method for the values of all options. `adaln_rank` none: modulations stay dense."""
    recipe = Recipe(**{name: values[name] for name in ("experts", "router", "mean", "refit", "top_k", "seed")})
    names = (
        "preset",
        "groups",
        "active",
        "selection",
        "block_router",
        "stand_ins",
        "ffns",
        "baseline",
        "predictor_width",
        "importance",
    )
    return {name: values[name] for name in names} | {
        "router": values["router_kind"],
        "recipe": recipe,
        "adaln_rank": None if values["adaln_rank"] == "none" else values["adaln_rank"],
    }

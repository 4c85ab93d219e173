"""What each control makes of a FLUX-MoE's settings, as pure functions: (settings, values, config, moment) -> settings.

The controls of a MODEL are folded in the order of the chain: each sees the settings that those before it have made. A
`moment` is one evaluation of the model; None is any: what depends on it is then checked and left out. Within a fold
`mask` is {FFN: weights}, plain numbers for every FFN; live values, moments and tensors are evaluation_settings.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

from ...d2m_model.config import FluxMoEConfig
from ..model.settings import active_blocks
from .text_rules import Piece, numbers_of, pieces_of, rules_of

AS_IN_FILE = "as in the file"
GATES = ("sum", "normalised")
MOST_EXPERTS = 64  # of widgets; the paper's models have 12
MOST_BLOCKS = 64
MOST_CAPACITY = 8.0
LONGEST_TEXT = 20_000
PERCENT, SIGMA = "percent", "sigma"
TOP_K, ACTIVE_BLOCKS, CAPACITY = "top_k", "active_blocks", "capacity"
FOLDED = (TOP_K, "gate", CAPACITY, ACTIVE_BLOCKS, "mask")  # the settings that folds make
EDGE = 1 + 1e-6  # of a span: sigmas are rounded to float32, and a step on an edge is in the span that begins there

Settings = dict[str, Any]
Values = Mapping[str, Any]
Weights = dict[str, tuple[float, ...]]  # of every expert, by FFN


@dataclass(kw_only=True, slots=True, frozen=True)
class Moment:
    """One evaluation of the model within a run."""

    evaluation: int
    sigma: float
    sigma_at: Callable[[float], float]  # of a share of the model's whole schedule, 0 to 1


# What a file can have


def top_k_of(value: int, config: FluxMoEConfig) -> int:
    if not config.ffns:
        raise ValueError(
            "Top-K has no effect on this FLUX-MoE, which has block groups and no experts. Bypass this node."
        )
    if config.capacity_router is not None:
        raise ValueError(
            "Top-K has no effect on this FLUX-MoE: its capacity routers give every token as many experts as it needs. "
            "What steers them is `capacity`."
        )
    experts = fewest_experts(config)
    if not 0 <= value <= experts:
        raise ValueError(f"Top-K is {value}, but this FLUX-MoE has {experts} experts per FFN. Choose 0 to {experts}.")
    return value


def capacity_of(value: float, config: FluxMoEConfig) -> float:
    if config.capacity_router is None:
        raise ValueError(
            "Capacity has no effect on this FLUX-MoE, which has no capacity routers: what steers its experts is `top_k`."
        )
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"Capacity is {value}; expected 0 (no experts) or more, where 1 is the file's own.")
    return value


def active_blocks_of(value: int | Sequence[int], config: FluxMoEConfig) -> int | tuple[int, ...]:
    if not config.groups:
        raise ValueError(
            "Active blocks have no effect on this FLUX-MoE, which has no block groups (presets M, S and XS have). "
            "Bypass this node."
        )
    active_blocks(value, config.groups)
    # A tuple: ComfyUI's merging of options would lengthen a list.
    return value if isinstance(value, int) else tuple(value)


def fewest_experts(config: FluxMoEConfig) -> int:
    return min(layout.experts for layout in config.ffns.values())


# Folds


def fold_settings(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    return {**settings, **values}


def fold_top_k(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """A later Top-K replaces an earlier one, its gate too."""
    if config.ffns and config.capacity_router is not None:
        chosen: Settings = {CAPACITY: capacity_of(values.get(CAPACITY, 1.0), config)}
    else:
        chosen = {TOP_K: top_k_of(values[TOP_K], config)}
    if values.get("gate", AS_IN_FILE) != AS_IN_FILE:
        chosen["gate"] = values["gate"]
    return {key: value for key, value in settings.items() if key != "gate"} | chosen


def fold_active_blocks(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    per_group = values.get("per_group", "").strip()
    return settings | {
        ACTIVE_BLOCKS: active_blocks_of(numbers_of(per_group) if per_group else values[ACTIVE_BLOCKS], config)
    }


def fold_schedule(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """The last piece that covers the moment holds; where none does, what was before it."""
    setting, held = values["setting"], settings
    pieces = pieces_of(values["pieces"])
    in_hundreds = any(piece.signed or piece.end > 1 for piece in pieces)
    for piece in pieces:
        value = piece_value(piece, setting, config)
        sigmas = percent_span(piece, in_hundreds, moment) if values["unit"] == PERCENT else sigma_span(piece)
        if moment is not None and sigmas is not None and sigmas[0] * EDGE >= moment.sigma > sigmas[1] * EDGE:
            held = {**settings, setting: value}
    return held


def piece_value(piece: Piece, setting: str, config: FluxMoEConfig) -> Any:
    try:
        if setting == TOP_K:
            return top_k_of(int(piece.value), config)
        if setting == CAPACITY:
            return capacity_of(float(piece.value), config)
        blocks = numbers_of(piece.value)
        return active_blocks_of(blocks if "," in piece.value else blocks[0], config)
    except ValueError as error:
        said = str(error)
        if "invalid literal" in said or "could not convert" in said:
            said = f"{piece.value!r} is no {'whole ' if setting == TOP_K else ''}number."
        raise ValueError(f"Line {piece.line} of pieces: {said}") from None


def percent_span(piece: Piece, in_hundreds: bool, moment: Moment | None) -> tuple[float, float] | None:
    """From its first sigma, included, down to its last, left out unless the schedule ends there."""
    whole = 100 if in_hundreds else 1
    if not 0 <= piece.start < piece.end <= whole:
        raise ValueError(
            f"Line {piece.line} of pieces goes from {piece.start:g} to {piece.end:g} %; expected two rising numbers "
            "from 0 to 100 (or shares from 0 to 1 throughout)."
        )
    if moment is None:
        return None
    start = math.inf if piece.start == 0 else moment.sigma_at(piece.start / whole)
    return start, -1.0 if piece.end == whole else moment.sigma_at(piece.end / whole)


def sigma_span(piece: Piece) -> tuple[float, float]:
    if piece.signed or not piece.start > piece.end:
        sign = "%" if piece.signed else ""
        raise ValueError(
            f"Line {piece.line} of pieces goes from {piece.start:g}{sign} to {piece.end:g}{sign}; expected two falling "
            "sigmas, such as 1 - 0.6: sampling begins at the largest sigma. Or choose the unit percent."
        )
    return piece.start, piece.end or -1.0


def fold_expert_mask(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """Within one mask a later rule replaces an earlier one's weights; masks multiply."""
    weights = expert_weights(values["mask"], config)
    return settings if weights is None else settings | {"mask": multiplied(settings.get("mask"), weights)}


def expert_weights(text: str, config: FluxMoEConfig) -> Weights | None:
    """Of every expert of every FFN, so that masks look alike to torch.compile; None: the text says nothing."""
    rules = rules_of(text)
    if not rules:
        return None
    if not config.ffns:
        raise ValueError("An expert mask has no effect on this FLUX-MoE, which has no experts. Bypass this node.")
    found = {name: [1.0] * layout.experts for name, layout in config.ffns.items()}
    for rule in rules:
        names = [name for name in found if fnmatchcase(name, rule.blocks)]
        if not names:
            routed = ", ".join(found)
            raise ValueError(f"Line {rule.line} of mask names {rule.blocks!r}; this FLUX-MoE has experts in {routed}.")
        for name in names:
            for expert, weight in rule.weights.items():
                experts = len(found[name])
                if expert is None:
                    found[name] = [weight] * experts
                elif expert < experts:
                    found[name][expert] = weight
                else:
                    raise ValueError(
                        f"Line {rule.line} of mask names expert {expert}; {name} has {experts}, numbered from 0. "
                        f"Choose 0 to {experts - 1}."
                    )
    return {name: tuple(weights) for name, weights in found.items()}


def multiplied(before: Mapping[str, Sequence[float] | Tensor] | None, weights: Weights) -> Weights:
    if before is None:
        return weights
    numbers = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in before.items()}
    pairs = {name: (numbers.get(name, [1.0] * len(own)), own) for name, own in weights.items()}
    return {name: tuple(a * b for a, b in zip(*pair, strict=True)) for name, pair in pairs.items()}


# What a run's log says, and how it is replayed


def in_full(settings: Values, config: FluxMoEConfig) -> Settings:
    """What the model uses under `settings`, as JSON: theirs, or else the file's, of what the file has. `mask`, where
    there is one, has the weights of every expert by FFN."""
    found: Settings = {}
    if config.ffns:
        capacity = config.capacity_router is not None
        found = {CAPACITY: settings.get(CAPACITY, 1.0)} if capacity else {TOP_K: settings.get(TOP_K, config.top_k)}
        found["gate"] = settings.get("gate", config.gate.mode)
    if config.groups:
        found[ACTIVE_BLOCKS] = active_blocks(settings.get(ACTIVE_BLOCKS), config.groups)
    if settings.get("mask"):
        weights = multiplied(settings["mask"], all_whole(config))
        found["mask"] = {ffn: list(of_ffn) for ffn, of_ffn in weights.items()}
    return found


def logged(settings: Values, config: FluxMoEConfig, masks: list[dict[str, dict[str, float]]]) -> Settings:
    """The same for a log: `mask` is a place in `masks`, which grows as needed and names weights other than 1."""
    said = in_full(settings, config)
    mask = {
        ffn: {str(expert): weight for expert, weight in enumerate(weights) if weight != 1}
        for ffn, weights in said.pop("mask", {}).items()
    }
    if mask := {ffn: weights for ffn, weights in mask.items() if weights}:
        if mask not in masks:
            masks.append(mask)
        said["mask"] = masks.index(mask)
    return said


def all_whole(config: FluxMoEConfig) -> Weights:
    return {name: (1.0,) * layout.experts for name, layout in config.ffns.items()}


def fold_replay(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """The log's settings in place of those before; beyond its end the last ones hold."""
    log = values["log"]
    entry = log["evaluations"][min(moment.evaluation if moment else 0, len(log["evaluations"]) - 1)]
    found = {key: value for key, value in settings.items() if key not in FOLDED}
    if TOP_K in entry:
        found[TOP_K] = top_k_of(entry[TOP_K], config)
    if CAPACITY in entry:
        found[CAPACITY] = capacity_of(entry[CAPACITY], config)
    if "gate" in entry:
        found["gate"] = entry["gate"]
    if ACTIVE_BLOCKS in entry:
        found[ACTIVE_BLOCKS] = active_blocks_of(entry[ACTIVE_BLOCKS], config)
    if "mask" in entry:
        mask = {name: list(weights) for name, weights in all_whole(config).items()}
        for ffn, weights in log["masks"][entry["mask"]].items():
            for expert, weight in weights.items():
                if ffn not in mask or int(expert) >= len(mask[ffn]):
                    raise ValueError(
                        f"The log weighs expert {expert} of {ffn}, which this FLUX-MoE does not have. "
                        "Load the FLUX-MoE that the image was made with."
                    )
                mask[ffn][int(expert)] = weight
        found["mask"] = {name: tuple(weights) for name, weights in mask.items()}
    return found


# Kinds of control


def whole_number(most: int) -> Callable[[object], None]:
    def check(value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"is {value!r}; expected a whole number from 0 to {most}.")

    return check


def number(most: float) -> Callable[[object], None]:
    def check(value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"is {value!r}; expected a number from 0 to {most:g}.")

    return check


def one_of(*choices: str) -> Callable[[object], None]:
    def check(value: object) -> None:
        if value not in choices:
            raise ValueError(f"is {value!r}; expected one of {', '.join(choices)}.")

    return check


def text(parse: Callable[[str], object]) -> Callable[[object], None]:
    def check(value: object) -> None:
        if not isinstance(value, str) or len(value) > LONGEST_TEXT:
            found = f"{len(value)} characters long" if isinstance(value, str) else repr(value)
            raise ValueError(f"is {found}; expected a text of up to {LONGEST_TEXT} characters.")
        try:
            parse(value)
        except ValueError as error:
            raise ValueError(f"is wrong: {error}") from None

    return check


class Kind(NamedTuple):
    fold: Callable[[Settings, Values, FluxMoEConfig, Moment | None], Settings]
    live: Mapping[str, Callable[[object], None]]  # by widget that may be moved while sampling: raises ValueError


KINDS = {
    "settings": Kind(fold_settings, {}),
    "D2MTopK": Kind(
        fold_top_k,
        {TOP_K: whole_number(MOST_EXPERTS), "gate": one_of(AS_IN_FILE, *GATES), CAPACITY: number(MOST_CAPACITY)},
    ),
    "D2MActiveBlocks": Kind(
        fold_active_blocks,
        {
            ACTIVE_BLOCKS: whole_number(MOST_BLOCKS),
            "per_group": text(lambda written: written.strip() and numbers_of(written)),
        },
    ),
    "D2MSchedule": Kind(
        fold_schedule,
        {
            "setting": one_of(TOP_K, ACTIVE_BLOCKS, CAPACITY),
            "unit": one_of(PERCENT, SIGMA),
            "pieces": text(pieces_of),
        },
    ),
    "D2MExpertMask": Kind(fold_expert_mask, {"mask": text(rules_of)}),
    "D2MReplay": Kind(fold_replay, {}),
}

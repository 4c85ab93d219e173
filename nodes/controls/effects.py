"""The effect of each control node on a FLUX-MoE's settings, as pure functions.

Every effect has the signature (settings, values, config, moment) -> settings, where `values` are the node's widgets.
The effects of a MODEL's controls are applied in the order of their chain: each sees the settings that those before it
have made. `moment` is one evaluation of the model; if it is None, a control is only checked where its effect depends
on the moment. Effects keep `mask` as {FFN: weights} in plain numbers, for every FFN. Live values, tensors and the
choice of the moment are the business of evaluation_settings.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from ...d2m_model.config import FluxMoEConfig
from ...d2m_model.foreign import MessageError
from ...d2m_model.routers import kind_with_setting
from ..model.settings import TOP_K_BY_FFN, active_blocks, router_value
from .widget_text import SchedulePiece, parse_block_counts, parse_mask, parse_number, parse_schedule

AS_IN_FILE = "as in the file"
PERCENT, SIGMA = "percent", "sigma"
TOP_K, ACTIVE_BLOCKS, CAPACITY = "top_k", "active_blocks", "capacity"
CONTROLLED = (TOP_K, TOP_K_BY_FFN, "gate", CAPACITY, ACTIVE_BLOCKS, "mask")  # the settings that effects make

# Sigmas are rounded to float32, and a step on the edge of a span belongs to the span that begins there.
_EDGE = 1 + 1e-6

Settings = dict[str, Any]
Values = Mapping[str, Any]
ExpertWeights = dict[str, tuple[float, ...]]  # one weight per expert, by FFN


@dataclass(kw_only=True, slots=True, frozen=True)
class Moment:
    """One evaluation of the model within a sampling run.

    sigma_at      sigma at a fraction of the model's whole schedule, 0 to 1
    sigmas        noise levels of the run; empty if they are not known
    image_tokens  of the run's pictures; None if it is not known
    memo          results that effects keep for the rest of the run
    """

    evaluation: int
    sigma: float
    sigma_at: Callable[[float], float]
    sigmas: tuple[float, ...] = ()
    image_tokens: int | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict)


# Checks against the file


def check_router_setting(setting: str, value: float, config: FluxMoEConfig) -> float:
    """Return the value of Top-K or Capacity.

    Raises ValueError if another setting steers the routers of the FLUX-MoE, or if they cannot run at this value.
    """
    kind, router = kind_with_setting(setting), config.router
    assert kind is not None
    if not config.ffns and setting == TOP_K:
        raise ValueError(
            "Top-K has no effect on this FLUX-MoE, which has block groups and no experts. Bypass this node."
        )
    if setting != router.setting:
        raise ValueError(f"{kind.label} has no effect on this FLUX-MoE: {router.steering}")
    return router.checked(value, config.fewest_experts)


def check_active_blocks(value: int | Sequence[int], config: FluxMoEConfig) -> int | tuple[int, ...]:
    """Return `value`, a list as a tuple. Raises ValueError if the FLUX-MoE cannot run so many blocks."""
    if not config.groups:
        raise ValueError(
            "Active blocks have no effect on this FLUX-MoE, which has no block groups (presets M, S and XS have them). "
            "Bypass this node."
        )
    active_blocks(value, config.groups)
    # Not a list: ComfyUI would extend it when it merges options.
    return value if isinstance(value, int) else tuple(value)


def check_top_k_by_ffn(values: Mapping[str, int], config: FluxMoEConfig) -> dict[str, int]:
    """Return experts per token by FFN, as a log has them. Raises ValueError if the FLUX-MoE has other FFNs or fewer experts."""
    fits = config.router.setting == TOP_K and set(values) == set(config.ffns)
    if not fits or any(not 0 <= k <= config.ffns[name].experts for name, k in values.items()):
        raise ValueError(
            f"The log has a budget's allotment for {len(values)} FFNs, which does not fit the {len(config.ffns)} routed FFNs "
            "of this FLUX-MoE and their experts. Load the FLUX-MoE that the image was made with."
        )
    return dict(values)


# Effects


def apply_top_k(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """Set Top-K, or the capacity of a file with capacity routers. Replaces the gate of an earlier Top-K node too."""
    setting = config.router.setting if config.ffns else TOP_K
    value = values.get(setting, config.router_value)
    changed: Settings = {setting: check_router_setting(setting, value, config)}
    if values.get("gate", AS_IN_FILE) != AS_IN_FILE:
        changed["gate"] = values["gate"]
    return {key: value for key, value in settings.items() if key not in ("gate", TOP_K_BY_FFN)} | changed


def apply_active_blocks(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """Set the number of active blocks, for all block groups or for each."""
    per_group = values.get("per_group", "").strip()
    blocks = parse_block_counts(per_group) if per_group else values[ACTIVE_BLOCKS]
    return settings | {ACTIVE_BLOCKS: check_active_blocks(blocks, config)}


def apply_schedule(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """Set the value of the last piece that covers the moment. Change nothing where no piece does."""
    setting, scheduled = values["setting"], settings
    pieces = parse_schedule(values["pieces"])
    in_hundreds = any(piece.percent_sign or piece.end > 1 for piece in pieces)
    for piece in pieces:
        value = _piece_value(piece, setting, config)
        span = _percent_span(piece, in_hundreds, moment) if values["unit"] == PERCENT else _sigma_span(piece)
        if moment is not None and span is not None and span[0] * _EDGE >= moment.sigma > span[1] * _EDGE:
            scheduled = {**settings, setting: value}
            if setting == TOP_K:  # in place of a budget's
                scheduled.pop(TOP_K_BY_FFN, None)
    return scheduled


def _piece_value(piece: SchedulePiece, setting: str, config: FluxMoEConfig) -> Any:
    kind = kind_with_setting(setting)
    try:
        if kind is not None:
            return check_router_setting(setting, parse_number(piece.value, whole=kind.whole), config)
        blocks = parse_block_counts(piece.value)
        return check_active_blocks(blocks if "," in piece.value else blocks[0], config)
    except ValueError as error:
        raise ValueError(f"Line {piece.line} of pieces: {error}") from None


def _percent_span(piece: SchedulePiece, in_hundreds: bool, moment: Moment | None) -> tuple[float, float] | None:
    """Return the sigmas of a piece, from its first (included) to its last (excluded, unless the schedule ends there)."""
    full = 100 if in_hundreds else 1
    if not 0 <= piece.start < piece.end <= full:
        raise ValueError(
            f"Line {piece.line} of pieces goes from {piece.start:g} to {piece.end:g} %; expected two rising numbers "
            "from 0 to 100 (or from 0 to 1 in all pieces)."
        )
    if moment is None:
        return None
    start = math.inf if piece.start == 0 else moment.sigma_at(piece.start / full)
    return start, -1.0 if piece.end == full else moment.sigma_at(piece.end / full)


def _sigma_span(piece: SchedulePiece) -> tuple[float, float]:
    if piece.percent_sign or not piece.start > piece.end:
        sign = "%" if piece.percent_sign else ""
        raise ValueError(
            f"Line {piece.line} of pieces goes from {piece.start:g}{sign} to {piece.end:g}{sign}; expected two falling "
            "sigmas, such as 1 - 0.6: sampling begins at the largest sigma. Or choose the unit percent."
        )
    return piece.start, piece.end or -1.0


def apply_expert_mask(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """Multiply the mask by that of the text. Within one text a later rule replaces the weights of an earlier one."""
    weights = _mask_weights(values["mask"], config)
    return settings if weights is None else settings | {"mask": _multiply_masks(settings.get("mask"), weights)}


def _mask_weights(text: str, config: FluxMoEConfig) -> ExpertWeights | None:
    """Return weights of every expert of every FFN, so that torch.compile sees masks of one form; None without rules."""
    rules = parse_mask(text)
    if not rules:
        return None
    if not config.ffns:
        raise ValueError("An expert mask has no effect on this FLUX-MoE, which has no experts. Bypass this node.")
    weights_of = {name: list(weights) for name, weights in _neutral_mask(config).items()}
    for rule in rules:
        names = [name for name in weights_of if fnmatchcase(name, rule.blocks)]
        if not names:
            routed = ", ".join(weights_of)
            raise ValueError(f"Line {rule.line} of mask names {rule.blocks!r}; this FLUX-MoE has experts in {routed}.")
        for name in names:
            for expert, weight in rule.weights.items():
                experts = len(weights_of[name])
                if expert is None:
                    weights_of[name] = [weight] * experts
                elif expert < experts:
                    weights_of[name][expert] = weight
                else:
                    raise ValueError(
                        f"Line {rule.line} of mask names expert {expert}; {name} has {experts}, numbered from 0. "
                        f"Choose 0 to {experts - 1}."
                    )
    return {name: tuple(weights) for name, weights in weights_of.items()}


def _neutral_mask(config: FluxMoEConfig) -> ExpertWeights:
    return {name: (1.0,) * layout.experts for name, layout in config.ffns.items()}


def _multiply_masks(mask: Mapping[str, Sequence[float] | Tensor] | None, weights: ExpertWeights) -> ExpertWeights:
    if mask is None:
        return weights
    numbers = {name: values.tolist() if isinstance(values, Tensor) else values for name, values in mask.items()}
    pairs = {name: (numbers.get(name, [1.0] * len(own)), own) for name, own in weights.items()}
    return {name: tuple(a * b for a, b in zip(*pair, strict=True)) for name, pair in pairs.items()}


def apply_replay(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """Replace the settings by those of the log. After its last evaluation, the last settings stay."""
    log = values["log"]
    entry = log["evaluations"][min(moment.evaluation if moment else 0, len(log["evaluations"]) - 1)]
    replayed = {key: value for key, value in settings.items() if key not in CONTROLLED}
    for setting in (TOP_K, CAPACITY):
        if setting in entry:
            replayed[setting] = check_router_setting(setting, entry[setting], config)
    if "allotment" in entry:
        replayed[TOP_K_BY_FFN] = check_top_k_by_ffn(log["allotments"][entry["allotment"]], config)
    if "gate" in entry:
        replayed["gate"] = entry["gate"]
    if ACTIVE_BLOCKS in entry:
        replayed[ACTIVE_BLOCKS] = check_active_blocks(entry[ACTIVE_BLOCKS], config)
    if "mask" in entry:
        mask = {name: list(weights) for name, weights in _neutral_mask(config).items()}
        for ffn, weights in log["masks"][entry["mask"]].items():
            for expert, weight in weights.items():
                if ffn not in mask or int(expert) >= len(mask[ffn]):
                    raise MessageError(
                        f"The log has a weight for expert {expert} of {ffn[:100]}, which this FLUX-MoE does not have. "
                        "Load the FLUX-MoE that the image was made with."
                    )
                mask[ffn][int(expert)] = weight
        replayed["mask"] = {name: tuple(weights) for name, weights in mask.items()}
    return replayed


# Settings as traces and logs have them


def effective_settings(settings: Values, config: FluxMoEConfig) -> Settings:
    """Return what the model uses under `settings`, as JSON: the file's own values fill in for absent settings.

    Settings without effect on this file are left out. `mask`, if there is one, has the weights of every expert by FFN.
    """
    effective: Settings = {}
    if config.ffns:
        effective[config.router.setting] = router_value(config, settings)
        effective["gate"] = settings.get("gate", config.gate.mode)
        if TOP_K_BY_FFN in settings:
            del effective[config.router.setting]
            effective[TOP_K_BY_FFN] = settings[TOP_K_BY_FFN]
    if config.groups:
        effective[ACTIVE_BLOCKS] = active_blocks(settings.get(ACTIVE_BLOCKS), config.groups)
    if settings.get("mask"):
        mask = _multiply_masks(settings["mask"], _neutral_mask(config))
        effective["mask"] = {ffn: list(weights) for ffn, weights in mask.items()}
    return effective


def log_entry(
    settings: Values,
    config: FluxMoEConfig,
    masks: list[dict[str, dict[str, float]]],
    allotments: list[dict[str, int]],
) -> Settings:
    """Return the effective settings for a log. `mask` and `allotment` are indices into lists, which grow as needed.

    Only weights other than 1 are written. `allotment` stands for the experts per token by FFN.
    """
    entry = effective_settings(settings, config)
    if (by_ffn := entry.pop(TOP_K_BY_FFN, None)) is not None:
        if by_ffn not in allotments:
            allotments.append(by_ffn)
        entry["allotment"] = allotments.index(by_ffn)
    mask = {
        ffn: {str(expert): weight for expert, weight in enumerate(weights) if weight != 1}
        for ffn, weights in entry.pop("mask", {}).items()
    }
    if mask := {ffn: weights for ffn, weights in mask.items() if weights}:
        if mask not in masks:
            masks.append(mask)
        entry["mask"] = masks.index(mask)
    return entry

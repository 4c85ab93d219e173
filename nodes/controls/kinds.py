"""The kinds of control, by node id: the effect of each, and the widgets that can be changed while sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

from ...d2m_model.config import FluxMoEConfig, GateMode
from .budget_effect import BUDGET, apply_budget
from .effects import (
    ACTIVE_BLOCKS,
    AS_IN_FILE,
    CAPACITY,
    PERCENT,
    SIGMA,
    TOP_K,
    Moment,
    Settings,
    Values,
    apply_active_blocks,
    apply_expert_mask,
    apply_replay,
    apply_schedule,
    apply_top_k,
)
from .widget_text import MAX_TEXT, parse_block_counts, parse_mask, parse_schedule

GATES: tuple[str, ...] = get_args(GateMode)
# Limits of the widgets. The models of the Dense2MoE paper have 12 experts.
MAX_EXPERTS = 64
MAX_BLOCKS = 64
MAX_CAPACITY = 8.0

ValueCheck = Callable[[object], None]  # raises ValueError, whose message follows the widget's name


class ControlKind(NamedTuple):
    """The effect of a control, and a check for each widget that can be changed while sampling."""

    apply: Callable[[Settings, Values, FluxMoEConfig, Moment | None], Settings]
    live: Mapping[str, ValueCheck]


def _whole_number(largest: int) -> ValueCheck:
    def check(value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
            raise ValueError(f"is {value!r}; expected a whole number from 0 to {largest}.")

    return check


def _number(largest: float) -> ValueCheck:
    def check(value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= largest:
            raise ValueError(f"is {value!r}; expected a number from 0 to {largest:g}.")

    return check


def _one_of(*options: str) -> ValueCheck:
    def check(value: object) -> None:
        if value not in options:
            raise ValueError(f"is {value!r}; expected one of {', '.join(options)}.")

    return check


def _text(parse: Callable[[str], object]) -> ValueCheck:
    def check(value: object) -> None:
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            actual = f"{len(value)} characters long" if isinstance(value, str) else repr(value)
            raise ValueError(f"is {actual}; expected a text of up to {MAX_TEXT} characters.")
        try:
            parse(value)
        except ValueError as error:
            raise ValueError(f"is wrong: {error}") from None

    return check


CONTROL_KINDS = {
    "D2MTopK": ControlKind(
        apply_top_k,
        {TOP_K: _whole_number(MAX_EXPERTS), "gate": _one_of(AS_IN_FILE, *GATES), CAPACITY: _number(MAX_CAPACITY)},
    ),
    "D2MBudget": ControlKind(apply_budget, {BUDGET: _number(1.0)}),
    "D2MActiveBlocks": ControlKind(
        apply_active_blocks,
        {
            ACTIVE_BLOCKS: _whole_number(MAX_BLOCKS),
            "per_group": _text(lambda value: value.strip() and parse_block_counts(value)),
        },
    ),
    "D2MSchedule": ControlKind(
        apply_schedule,
        {
            "setting": _one_of(TOP_K, ACTIVE_BLOCKS, CAPACITY),
            "unit": _one_of(PERCENT, SIGMA),
            "pieces": _text(parse_schedule),
        },
    ),
    "D2MExpertMask": ControlKind(apply_expert_mask, {"mask": _text(parse_mask)}),
    "D2MReplay": ControlKind(apply_replay, {}),
}

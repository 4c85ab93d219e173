"""The effect of the Budget node: experts per token by FFN, and active blocks, at the noise level of an evaluation."""

from __future__ import annotations

from ...d2m_model.budget import Allotment, allot, everything, one_value
from ...d2m_model.config import FluxMoEConfig
from ...d2m_model.cost import Tokens
from ..model.settings import TOP_K_BY_FFN
from .effects import ACTIVE_BLOCKS, CAPACITY, TOP_K, Moment, Settings, Values

BUDGET = "budget"
_MEGAPIXEL = Tokens(image=4096, text=512)  # as the cost readout counts
WITHOUT_TABLE = (
    "This FLUX-MoE has no sensitivity table, so the budget is one {label} for every FFN and step. Measure it: "
    "python -m d2m_train sensitivity FILE --teacher F --data D --out G."
)


def check_budget(value: float, config: FluxMoEConfig) -> float:
    """Return the budget. Raises ValueError for a wrong one, or if it has no effect on this FLUX-MoE."""
    if not 0 <= value <= 1:
        raise ValueError(f"The budget is {value}; expected a share of the dense model's FLOPs, 0 to 1.")
    if not config.ffns and config.sensitivity is None:
        raise ValueError(
            "A budget has no effect on this FLUX-MoE, which has no experts and no sensitivity table for its block groups. "
            "Bypass this node."
        )
    return value


def apply_budget(settings: Settings, values: Values, config: FluxMoEConfig, moment: Moment | None) -> Settings:
    """Spend the budget, in place of what Top-K, Capacity and Active blocks before it set."""
    budget = check_budget(values[BUDGET], config)
    if moment is None:
        return settings
    kept = {key: value for key, value in settings.items() if key not in (TOP_K, CAPACITY, ACTIVE_BLOCKS, TOP_K_BY_FFN)}
    if (BUDGET, budget) not in moment.memo:
        moment.memo[BUDGET, budget] = _plan(budget, config, moment)
    plan: Allotment | Settings = moment.memo[BUDGET, budget]
    if not isinstance(plan, Allotment):
        return kept | plan
    spending = plan.at(moment.sigma)
    spent: Settings = {TOP_K_BY_FFN: dict(spending.top_k)} if config.ffns else {}
    if config.groups:
        spent[ACTIVE_BLOCKS] = tuple(spending.active_blocks)
    return kept | spent


def _plan(budget: float, config: FluxMoEConfig, moment: Moment) -> Allotment | Settings:
    """Return the allotment of a run, or for a file without a table the settings for all of its steps."""
    table = config.sensitivity
    if table is not None:
        tokens = Tokens(image=moment.image_tokens or table.image_tokens, text=table.text_tokens)
        return allot(config, table, budget, tokens, moment.sigmas)
    tokens = Tokens(image=moment.image_tokens or _MEGAPIXEL.image, text=_MEGAPIXEL.text)
    settings: Settings = {config.router.setting: one_value(config, budget, tokens)}
    if budget >= 1 and config.groups:
        settings[ACTIVE_BLOCKS] = tuple(everything(config).active_blocks)
    return settings

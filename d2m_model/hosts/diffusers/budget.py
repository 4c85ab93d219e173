"""A compute budget of a FLUX-MoE in diffusers: sets experts per token and active blocks before each forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ...budget import Allotment, Spending, allot, everything, one_value
from ...config import FluxMoEConfig
from ...cost import Tokens
from ...moe import MoEFFN
from .modules import GroupRouter

log = logging.getLogger(__name__)


class BudgetedModel(Protocol):
    """A FluxMoETransformer2DModel as a budget sees it."""

    @property
    def flux_moe(self) -> FluxMoEConfig: ...

    def moe_ffns(self) -> dict[str, MoEFFN]: ...

    def block_routers(self) -> list[GroupRouter]: ...

    def set_router_value(self, value: float) -> None: ...


class ModelBudget:
    """A budget, and its allotment for the number of tokens that the model got last.

    allotment  None before the first forward pass, and for a file without a sensitivity table
    """

    allotment: Allotment | None = None

    def __init__(self, budget: float, sigmas: Iterable[float] = ()) -> None:
        """Raises ValueError unless the budget is above 0, up to 1."""
        if not 0 < budget <= 1:
            raise ValueError(
                f"The budget is {budget}; expected a share of the dense model's FLOPs, above 0 and up to 1."
            )
        self.budget, self.sigmas = float(budget), tuple(float(sigma) for sigma in sigmas)
        self._tokens: Tokens | None = None
        self._one_value = 0.0

    @torch.compiler.disable
    def apply(self, model: BudgetedModel, image_BTC: Tensor, text_BLD: Tensor, timestep_B: Tensor) -> None:
        """Set what runs in the forward pass of these inputs. Samples share it: the first one's timestep decides."""
        tokens = Tokens(image=image_BTC.shape[1], text=text_BLD.shape[1])
        config = model.flux_moe
        if tokens != self._tokens:
            self._tokens = tokens
            self._plan(config, tokens)
        if self.allotment is not None:
            spending = self.allotment.at(float(timestep_B.reshape(-1)[0]))
        elif self.budget == 1 and config.router.whole:
            spending = everything(config)
        else:
            model.set_router_value(self._one_value)
            return
        _set(model, spending)

    def _plan(self, config: FluxMoEConfig, tokens: Tokens) -> None:
        table = config.sensitivity
        if table is not None:
            self.allotment = allot(config, table, self.budget, tokens, self.sigmas)
            return
        self._one_value = one_value(config, self.budget, tokens)
        log.warning(
            "This FLUX-MoE has no sensitivity table, so a budget of %.0f %% is one %s of %g for all FFNs and steps. "
            "Measure it: python -m d2m_train sensitivity FILE --teacher F --data D --out G.",
            100 * self.budget, config.router.label, self._one_value,
        )  # fmt: skip


def _set(model: BudgetedModel, spending: Spending) -> None:
    for name, moe in model.moe_ffns().items():
        moe.router_value = spending.top_k[name]
    for router, active in zip(model.block_routers(), spending.active_blocks, strict=True):
        router.active = active

"""Settings of one clone of a FLUX-MoE: transformer_options["d2m"], a plain dict whose keys are all optional.

- `top_k` (int): experts of a token. Not of a file with a capacity router.
- `gate` ("sum" or "normalised").
- `capacity` (number): of a file with a capacity router, the compute of its experts; 1 is the file's own, 0 is none.
- `active_blocks`: of a file with block groups, how many blocks run. One int for all of them (a group that has fewer
  blocks runs all it has), or a list with one int for each group, in the file's order.
- `mask`: weights of experts, {FFN: float32 [E]}: 0 mutes one, 1 leaves it. They multiply the gates of the experts chosen.
- `trace` (d2m_model.trace.Recorder): hears what every router chooses.

`controls` is not read by the model: it lists the controls of the clone in the order of their chain, as
evaluation_settings.ControlRecord. The settings above are their effects, as far as these do not depend on the moment.
While sampling, evaluation_settings.py applies the controls anew for every evaluation, with the live values of their
widgets (live_values.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...d2m_model.config import BlockGroup, FluxMoEConfig
from ...d2m_model.routers import Gate, TokenRouter, router_to_text

if TYPE_CHECKING:
    from ...d2m_model.trace import Recorder
    from .custom_operators import GraphChoice

OPTIONS_KEY = "d2m"
GRAPH_KEY = "d2m_graph"  # beside it, in one evaluation: see custom_operators.py
NEGATIVE_KEY = "d2m_negative"  # of prompts that a model of their own evaluates, its Run: see evaluation_settings.py


def settings_of(transformer_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (transformer_options or {}).get(OPTIONS_KEY) or {}


def router_value(config: FluxMoEConfig, settings: Mapping[str, Any]) -> float:
    """Value of the setting that steers the file's routers: the clone's, or else the file's."""
    value: float = settings.get(config.router.setting, config.router_value)
    return value


class Choice(NamedTuple):
    """How the tokens of one call are routed."""

    value: float  # of the setting that steers the router
    gate: Gate
    mask: Mapping[str, Tensor] | None = None  # weights of experts, float32 [E] by FFN
    trace: Recorder | None = None
    graph: GraphChoice | None = None  # the same for a graph of torch.compile, which is to read nothing else


@dataclass(kw_only=True, slots=True, frozen=True)
class FileChoice:
    """A file's own choice."""

    router: TokenRouter
    router_text: str  # the same, for graphs
    value: float
    gates: Mapping[str, Gate]  # by mode
    gate: str  # the file's own mode

    @classmethod
    def of(cls, config: FluxMoEConfig) -> FileChoice:
        gates = {mode: replace(config.gate, mode=mode) for mode in ("sum", "normalised")}
        return cls(
            router=config.router,
            router_text=router_to_text(config.router),
            value=config.router_value,
            gates=gates,
            gate=config.gate.mode,
        )

    def under(self, transformer_options: Mapping[str, Any] | None) -> Choice:
        """The sampled clone's settings, or else the file's."""
        graph = (transformer_options or {}).get(GRAPH_KEY)
        if graph is not None and torch.compiler.is_compiling():
            return Choice(value=self.value, gate=self.gates[self.gate], graph=graph)
        settings = settings_of(transformer_options)
        gate = self.gates[settings.get("gate", self.gate)]
        return Choice(
            value=settings.get(self.router.setting, self.value),
            gate=gate,
            mask=settings.get("mask"),
            trace=settings.get("trace"),
            graph=graph,
        )


def active_blocks(setting: int | Sequence[int] | None, groups: Sequence[BlockGroup]) -> list[int]:
    """How many blocks of each group run under the setting `active_blocks`; None leaves it to the file.

    Raises ValueError for a number that no group allows, or a list of another length than `groups`.
    """
    if setting is None:
        return [group.active for group in groups]
    if isinstance(setting, int) and not isinstance(setting, bool):
        most = max((group.blocks for group in groups), default=0)
        if not 0 <= setting <= most:
            raise ValueError(f"active_blocks is {setting}; expected 0 to {most}, the blocks of the largest group.")
        return [min(setting, group.blocks) for group in groups]
    if not isinstance(setting, list | tuple) or len(setting) != len(groups):
        raise ValueError(
            f"active_blocks is {setting!r}; expected one number, or a list of {len(groups)}, one for each block group "
            "of this FLUX-MoE."
        )
    for index, (active, group) in enumerate(zip(setting, groups, strict=True)):
        if not isinstance(active, int) or isinstance(active, bool) or not 0 <= active <= group.blocks:
            last = group.indices[-1]
            raise ValueError(
                f"active_blocks[{index}] is {active!r}; expected 0 to {group.blocks}, the blocks of block group {index} "
                f"({group.kind} blocks {group.first} to {last})."
            )
    return list(setting)

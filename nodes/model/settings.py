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

from ...d2m_model.config import BlockGroup, FluxMoEConfig, Gate

if TYPE_CHECKING:
    from ...d2m_model.trace import Recorder
    from .custom_operators import GraphChoice

OPTIONS_KEY = "d2m"
GRAPH_KEY = "d2m_graph"  # beside it, in one evaluation: see custom_operators.py
NEGATIVE_KEY = "d2m_negative"  # of prompts that a model of their own evaluates, its Run: see evaluation_settings.py


def settings_of(transformer_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (transformer_options or {}).get(OPTIONS_KEY) or {}


class Choice(NamedTuple):
    """How the tokens of one call are routed."""

    top_k: int
    gate: Gate
    capacity: float  # factor, in place of top_k where the router is a capacity router
    mask: Mapping[str, Tensor] | None = None  # weights of experts, float32 [E] by FFN
    trace: Recorder | None = None
    graph: GraphChoice | None = None  # the same for a graph of torch.compile, which is to read nothing else


@dataclass(kw_only=True, slots=True, frozen=True)
class FileChoice:
    """What a file says of that."""

    top_k: int
    gates: Mapping[str, Gate]  # by mode
    gate: str  # the file's own mode

    @classmethod
    def of(cls, config: FluxMoEConfig) -> FileChoice:
        gates = {mode: replace(config.gate, mode=mode) for mode in ("sum", "normalised")}
        return cls(top_k=config.top_k, gates=gates, gate=config.gate.mode)

    def under(self, transformer_options: Mapping[str, Any] | None) -> Choice:
        """The sampled clone's settings, or else the file's."""
        graph = (transformer_options or {}).get(GRAPH_KEY)
        if graph is not None and torch.compiler.is_compiling():
            return Choice(top_k=self.top_k, gate=self.gates[self.gate], capacity=1.0, graph=graph)
        settings = settings_of(transformer_options)
        gate = self.gates[settings.get("gate", self.gate)]
        return Choice(
            top_k=settings.get("top_k", self.top_k),
            gate=gate,
            capacity=settings.get("capacity", 1.0),
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

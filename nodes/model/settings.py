"""Settings of one clone of a FLUX-MoE: transformer_options["d2m"], a plain dict. All keys are optional.

- `top_k` (int): experts per token. Has no effect on a file with a capacity router.
- `top_k_by_ffn`: experts per token of single FFNs, {FFN: int}, in place of `top_k`.
- `gate` ("sum" or "normalised").
- `capacity` (number): compute of the experts in a file with a capacity router. 1 is the file's own, 0 runs no expert.
- `active_blocks`: number of blocks that run in the groups of a file. One int for all groups (a smaller group runs all of
  its blocks), or a list with one int per group, in the file's order.
- `mask`: weights of experts, {FFN: float32 [E]}. They multiply the gates of chosen experts: 0 mutes an expert, 1 leaves
  it as it is.
- `mask_on_device`: a copy of `mask` on the model's device, which spares a copy for every FFN.
- `trace` (d2m_model.trace.RoutingRecorder): records the choices of all routers.

`controls` is not read by the model: it lists the controls of the clone in the order of their chain, as
evaluation_settings.ControlRecord. The settings above are their effects, as far as these do not depend on the moment.
While sampling, evaluation_settings.py applies the controls anew for every evaluation, with the live values of their
widgets (live_values.py).

Packs that bring their own loop over the blocks may call them without transformer_options. Therefore the model also keeps
the options of a call in a context variable (`evaluation`), where blocks find the entries that a caller left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...d2m_model.config import BlockGroup, FluxMoEConfig
from ...d2m_model.routers import Gate, TokenRouter, router_to_text

if TYPE_CHECKING:
    from ...d2m_model.trace import RoutingRecorder

OPTIONS_KEY = "d2m"
TOP_K_BY_FFN = "top_k_by_ffn"
MASK_ON_DEVICE = "mask_on_device"
GRAPH_KEY = "d2m_graph"  # key of a GraphSettings in transformer_options, during one evaluation
CHOSEN_KEY = "d2m_chosen"  # choices of the block groups (block_groups.GroupChoices), during one evaluation
NEGATIVE_KEY = "d2m_negative"  # in negative prompts that have a model of their own: its NegativePromptRun


def settings_of(transformer_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (transformer_options or {}).get(OPTIONS_KEY) or {}


class CurrentEvaluation(NamedTuple):
    """One call of a FLUX-MoE."""

    config: FluxMoEConfig
    options: Mapping[str, Any]  # its transformer_options


_CURRENT: ContextVar[CurrentEvaluation | None] = ContextVar("d2m_evaluation", default=None)


@contextmanager
def evaluation(config: FluxMoEConfig, options: Mapping[str, Any]) -> Iterator[None]:
    """Keep the transformer_options of a call of the model for blocks that are called without them."""
    token = _CURRENT.set(CurrentEvaluation(config, options))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def complete_options(transformer_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a block's options with this pack's entries of the current evaluation where the caller left them out.

    Entries of other packs are not added: a dense FLUX would not get them either.
    """
    given, current = transformer_options or {}, _CURRENT.get()
    if current is None:
        return given
    keys = (OPTIONS_KEY, GRAPH_KEY, CHOSEN_KEY)
    missing = {key: current.options[key] for key in keys if key in current.options and key not in given}
    return {**given, **missing} if missing else given


def expert_weights(settings: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """Return the mask, on the model's device if there is a copy."""
    weights: Mapping[str, Tensor] | None = settings.get(MASK_ON_DEVICE) or settings.get("mask")
    return weights


def router_value(config: FluxMoEConfig, settings: Mapping[str, Any]) -> float:
    """Return the value of the setting that steers the routers: the clone's if it has one, or else the file's."""
    value: float = settings.get(config.router.setting, config.router_value)
    return value


class RoutingSettings(NamedTuple):
    """Settings of one evaluation as numbers, which enter a graph in one tensor."""

    normalised: float  # 1: gates of mode `normalised`; 0: `sum`
    scale: float  # of these gates
    masked: float  # 1: there are weights of experts
    replaced: float = 0.0  # 1: the current evaluation's settings, if there is one, stand in for these

    def packed(self) -> Tensor:
        """Return them as a float64 tensor on the host."""
        return torch.tensor(self, dtype=torch.float64)

    @classmethod
    def unpacked(cls, packed: Tensor) -> RoutingSettings:
        """Return the settings that `packed` made."""
        return cls(*packed.tolist())

    @property
    def gate(self) -> Gate:
        return Gate(mode="normalised" if self.normalised else "sum", scale=self.scale)


class GraphSettings(NamedTuple):
    """Settings of one evaluation for graphs of torch.compile, see custom_operators.py.

    settings    packed RoutingSettings, float64 on the host
    values_L    the router's value for each routed FFN, in the order of config.ffns, float64 on the host
    weights_LE  weights of experts, float32, one row per routed FFN
    """

    settings: Tensor
    values_L: Tensor
    weights_LE: Tensor


def graph_settings(config: FluxMoEConfig, settings: Mapping[str, Any], device: torch.device) -> GraphSettings:
    """Pack a clone's settings for graphs."""
    mask = expert_weights(settings) or {}
    numbers = RoutingSettings(
        normalised=settings.get("gate", config.gate.mode) == "normalised",
        scale=config.gate.scale,
        masked=bool(mask),
    )
    widest = max((layout.experts for layout in config.ffns.values()), default=0)
    weights_LE = torch.ones(len(config.ffns), widest, device=device)
    for row, ffn in enumerate(config.ffns if mask else ()):
        if ffn in mask:
            weights_LE[row, : mask[ffn].shape[0]] = mask[ffn].to(device)
    by_ffn, value = settings.get(TOP_K_BY_FFN, {}), router_value(config, settings)
    values_L = torch.tensor([by_ffn.get(ffn, value) for ffn in config.ffns], dtype=torch.float64)
    return GraphSettings(numbers.packed(), values_L, weights_LE)


def current_graph_settings(device: torch.device) -> GraphSettings | None:
    """Return the settings of the current evaluation for graphs, or None outside of evaluations."""
    current = _CURRENT.get()
    if current is None:
        return None
    made: GraphSettings | None = current.options.get(GRAPH_KEY)
    return made or graph_settings(current.config, settings_of(current.options), device)


class CallSettings(NamedTuple):
    """How the tokens of one call are routed."""

    value: float  # of the setting that steers the router
    gate: Gate
    values: Mapping[str, float] = {}  # of single FFNs
    mask: Mapping[str, Tensor] | None = None  # weights of experts, float32 [E] by FFN
    trace: RoutingRecorder | None = None
    graph: GraphSettings | None = None  # the same for a graph of torch.compile, which reads nothing else


@dataclass(kw_only=True, slots=True, frozen=True)
class FileSettings:
    """A file's own routing, and the settings of calls that clones make of it."""

    router: TokenRouter
    router_text: str  # the same, for graphs
    value: float
    gates: Mapping[str, Gate]  # by mode
    gate: str  # the file's own mode
    graph: GraphSettings  # for graphs of blocks that are called without options

    @classmethod
    def of(cls, config: FluxMoEConfig) -> FileSettings:
        gates = {mode: replace(config.gate, mode=mode) for mode in ("sum", "normalised")}
        normalised = config.gate.mode == "normalised"
        values_L = torch.full((len(config.ffns),), config.router_value, dtype=torch.float64)
        numbers = RoutingSettings(normalised, config.gate.scale, masked=False, replaced=True)
        return cls(
            router=config.router,
            router_text=router_to_text(config.router),
            value=config.router_value,
            gates=gates,
            gate=config.gate.mode,
            graph=GraphSettings(numbers.packed(), values_L, torch.ones(0, 0)),
        )

    def under(self, transformer_options: Mapping[str, Any] | None) -> CallSettings:
        """Return the settings of a call of the sampled clone; the file's values stand in for absent settings."""
        options = transformer_options or {}
        if not torch.compiler.is_compiling():
            options = complete_options(options)
        elif not torch.is_grad_enabled() and (GRAPH_KEY in options or OPTIONS_KEY not in options):
            graph = options.get(GRAPH_KEY, self.graph)
            return CallSettings(value=self.value, gate=self.gates[self.gate], graph=graph)
        settings = settings_of(options)
        gate = self.gates[settings.get("gate", self.gate)]
        return CallSettings(
            value=settings.get(self.router.setting, self.value),
            gate=gate,
            values=settings.get(TOP_K_BY_FFN, {}),
            mask=expert_weights(settings),
            trace=settings.get("trace"),
            graph=options.get(GRAPH_KEY),
        )


def active_blocks(setting: int | Sequence[int] | None, groups: Sequence[BlockGroup]) -> list[int]:
    """Return the number of active blocks of each group under the setting `active_blocks`; None takes the file's own.

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

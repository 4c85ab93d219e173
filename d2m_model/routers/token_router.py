"""The seam for token routers: everything that a kind of router states about itself.

A kind is a frozen dataclass below TokenRouter; its fields are what d2m_config says about the router of a file. Hosts,
trainer and nodes ask `config.router` and never which kind it is. To add a kind, write its file and add it to KINDS.

Shapes: T tokens, H hidden size, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .routing import Gate, Routing

RouterTensors = Mapping[str, Tensor]  # tensors of one FFN's router, by their names in the file after the FFN's
WEIGHT, BIAS = "router.weight", "router.bias"  # W_g and its bias


class RouterCompanion(nn.Module, ABC):
    """Parameters that the router of one FFN has beside W_g."""

    @abstractmethod
    def forward(self) -> dict[str, Tensor]:
        """The tensors by their names in the file. A call, because offloading libraries bring a module in when called."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set initial values: those of a model that is not loaded from a file."""


class TrainingCompanion(RouterCompanion):
    """Companion that routes in training, in the place of TokenRouter.route, and remembers what its own loss needs.

    While it `learns`, a training step calls `loss` after the forward pass, `take_update` after the backward pass, and
    `update` at its end, on every rank alike.
    """

    loss_name: ClassVar[str]  # key of the loss in logs
    pool_P: Tensor | None = None  # `pool_of` the batch's tokens that are no padding; None: all tokens

    @property
    def device(self) -> torch.device:
        """Device of the buffers, where pools belong."""
        return next(self.buffers()).device

    @property
    @abstractmethod
    def learns(self) -> bool:
        """True while the parameters are being trained."""

    @abstractmethod
    def route(self, x_TH: Tensor, tensors: RouterTensors, gate: Gate, *, remember: bool) -> Routing:
        """Route the tokens in training. `remember` is False in a forward pass that a checkpoint runs again."""

    @abstractmethod
    def loss(self) -> Tensor | None:
        """Loss of the remembered forward pass; None if there was none."""

    @abstractmethod
    def take_update(self) -> Tensor:
        """New value of the buffer that follows the forward passes, from the remembered one, which is then forgotten."""

    @abstractmethod
    def update(self, values: Tensor) -> None:
        """Set that buffer to the mean of the step's microbatches and ranks."""


def pool_of(keep_T: Tensor) -> Tensor:
    """Indices, int64 [P], of the tokens that a mask keeps (padding text tokens stay out of pools).

    Counting them makes the host wait for the device, so a step calls this once, not once for each layer.
    """
    return keep_T.flatten().nonzero().squeeze(1)


@dataclass(kw_only=True, frozen=True)
class TokenRouter(ABC):
    """Router of the tokens of every MoE FFN in a file.

    At run time one number steers it, the value of its `setting`: a key of the settings of hosts, schedules and logs.

    kind          name in options, in d2m_config ("<kind>_router") and in traces
    named         what messages call it
    setting       key of the run-time setting
    label         what messages call the setting
    option        command line option of the setting
    steering      why other settings have no effect, and which one has
    whole         the setting is a whole number
    needs_data    a conversion fits it to calibration data
    balanced      training balances the experts' load by a loss
    companion_name  attribute of a MoEFFN that holds the RouterCompanion
    names_in_model  names of tensors in a MoEFFN, where they differ from those in the file
    """

    kind: ClassVar[str]
    named: ClassVar[str]
    setting: ClassVar[str]
    label: ClassVar[str]
    option: ClassVar[str]
    steering: ClassVar[str]
    whole: ClassVar[bool]
    needs_data: ClassVar[bool]
    balanced: ClassVar[bool]
    companion_name: ClassVar[str | None] = None
    names_in_model: ClassVar[Mapping[str, str]] = {}

    def check(self, experts: int) -> None:  # noqa: B027 (a kind may have nothing to check)
        """Raise ConfigError for fields that FFNs of `experts` experts or more cannot have; 0 if there are no FFNs."""

    # Tensors of one FFN in the file

    def shapes(self, hidden_size: int, experts: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the file must have, by name after the FFN's. All are floating point."""
        return {WEIGHT: (experts, hidden_size)}

    def optional_shapes(self, hidden_size: int, experts: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the file may have besides."""
        return {BIAS: (experts,)}

    def problems(self, ffn: str, tensor: Callable[[str], Tensor]) -> Iterator[str]:
        """Sentences on values that cannot be, of tensors read by their names in the file."""
        return iter(())

    # Routing

    @abstractmethod
    def route(self, x_TH: Tensor, tensors: RouterTensors, *, gate: Gate, value: float) -> Routing:
        """Route tokens at the setting's `value`. Every token is routed by itself, in float32 whatever the dtypes.

        Raises ValueError for a value that cannot be.
        """

    def begin(self, x_TH: Tensor, tensors: RouterTensors, *, gate: Gate, value: float) -> Callable[[], Routing]:
        """Start to route as `route` does, and return a function that returns the routing.

        That function may wait for the device, and is best called after the device was given other work.
        """
        routing = self.route(x_TH, tensors, gate=gate, value=value)
        return lambda: routing

    def companion(self, tensors: RouterTensors) -> RouterCompanion | None:
        """Module with a copy of the tensors beside W_g; None if the kind has none."""
        return None

    # The run-time setting

    @abstractmethod
    def own_value(self, top_k: int) -> float:
        """Value of the setting at which a file of this `top_k` runs by itself. At 0 no expert runs."""

    @abstractmethod
    def checked(self, value: float, experts: int) -> float:
        """Return the value. Raises ValueError, for people, if FFNs of so many experts cannot run at it."""

    @abstractmethod
    def highest(self, experts: int) -> int | None:
        """The highest value of the setting; None if it has no bound."""

    def note(self, value: float, experts: int) -> str | None:
        """Sentence on what the cost at this value leaves open."""
        return None

    def saved(self, name: str, tensor: Tensor, value: float) -> Tensor:
        """Tensor `name` of a file that is to run by itself as this one runs at `value`."""
        return tensor

    @abstractmethod
    def described(self, top_k: int) -> str:
        """How tokens are routed, in a few words."""

    # Cost

    @abstractmethod
    def experts_per_token(self, value: float, experts: int) -> float:
        """Mean number of experts that a token goes to."""

    def parameters(self, hidden_size: int, experts: int) -> int:
        """Parameters of one FFN's router, optional ones left out."""
        return sum(math.prod(shape) for shape in self.shapes(hidden_size, experts).values())

    def flops(self, hidden_size: int, experts: int) -> int:
        """FLOPs of routing one token: two per multiply-accumulate of its linear layers."""
        shapes = self.shapes(hidden_size, experts)
        return sum(2 * math.prod(shape) for name, shape in shapes.items() if name.endswith(".weight"))

    # Conversion

    @classmethod
    @abstractmethod
    def for_conversion(cls, *, top_k: int, predictor_width: int) -> TokenRouter:
        """Router of a file that is converted for top_k experts per token."""

    @property
    def provenance(self) -> dict[str, object]:
        """Options of the conversion, for the provenance of the file."""
        return {}

    def fit(self, x_TH: Tensor, tensors: RouterTensors, generator: torch.Generator) -> dict[str, Tensor]:
        """Tensors beside W_g, float32, fitted to calibration inputs of the FFN. Raises ValueError for too few inputs."""
        return {}

    def chosen(self, x_TH: Tensor, tensors: RouterTensors, top_k: int) -> Tensor:
        """bool [T, E]: the experts that the file gives each token."""
        routing = self.route(x_TH, tensors, gate=Gate(mode="sum", scale=1.0), value=self.own_value(top_k))
        chosen_TE = torch.zeros_like(routing.logits_TE, dtype=torch.bool)
        return chosen_TE.index_put(
            (routing.token_A, routing.expert_A), torch.ones_like(routing.gate_A, dtype=torch.bool)
        )

    def fit_report(self, x_TH: Tensor, tensors: RouterTensors, chosen_TE: Tensor) -> dict[str, float]:
        """Measures of the fit on tokens that it has not seen, by their names in FFNReport."""
        return {}

"""A student's weights and optimizer state for checkpoints, in the same form whatever strategy trains it.

The form is that of torch.distributed.checkpoint.state_dict, by parameter name: `model`, `optimizer` and, with weight
averages, `average`. Tensors may be sharded; another number of processes can read what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

UNTRAINED_BUFFERS = (".neuron_order",)  # no training changes these


class StudentState(Protocol):
    """The state of a student in training. All methods are called on every rank alike."""

    def collect(self, averages: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the trained weights, the routers' buffers, the optimizer state and the averages."""
        ...

    def restore(self, averages: Mapping[str, Tensor], read: Callable[[dict[str, Any]], object]) -> None:
        """Take over a saved state, the averages included. `read` fills a state in place from the checkpoint."""
        ...


@dataclass(kw_only=True, slots=True)
class TorchState:
    """The state of a student in one process, under DDP or under FSDP2: torch puts it together."""

    model: Any
    optimizer: Any

    def collect(self, averages: Mapping[str, Tensor]) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        weights = {
            name: tensor
            for name, tensor in get_model_state_dict(self.model, options=options).items()
            if not name.endswith(UNTRAINED_BUFFERS)
        }
        state: dict[str, Any] = {"model": weights, "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        if averages:
            state["average"] = dict(averages)
        return state

    def restore(self, averages: Mapping[str, Tensor], read: Callable[[dict[str, Any]], object]) -> None:
        state = self.collect(averages)
        read(state)
        # Frozen weights are not in the state, hence not strict; the checkpoint itself was read strictly.
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        for name, average in averages.items():
            average.copy_(state["average"][name])

"""Which experts a token goes to, and with what weight (Sec. 3.1, Eq. 3).

capacity.py has the other router, DiffMoE's. Shapes: T tokens, H hidden size, E experts, K top_k, A assignments.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Gate


@dataclass(kw_only=True, slots=True)
class Routing:
    """The choice of a router: for every token its K experts, best first, and their weights.

    experts_TK int64 [T, K], gates_TK float32 [T, K], logits_TE float32 [T, E].
    """

    experts_TK: Tensor
    gates_TK: Tensor
    logits_TE: Tensor

    @property
    def probabilities_TE(self) -> Tensor:
        """alpha = softmax(W_g x), float32 [T, E]: what the balance loss and traces read."""
        return self.logits_TE.softmax(dim=-1)

    @property
    def gates_TE(self) -> Tensor:
        """Every expert's weight, float32 [T, E]: 0 where it is not chosen."""
        return torch.zeros_like(self.logits_TE).scatter(1, self.experts_TK, self.gates_TK)

    def weighed(self, weights_E: Tensor) -> Routing:
        """The same choice with the gates multiplied by their experts' weights: 0 mutes an expert, as if not chosen."""
        return replace(self, gates_TK=self.gates_TK * weights_E[self.experts_TK])


@dataclass(kw_only=True, slots=True)
class UnevenRouting:
    """The choice of a router that gives one token more experts than another: 0 to E of them.

    token_A and expert_A int64 [A], by token and then by expert; gate_A float32 [A], logits_TE float32 [T, E].
    """

    token_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    logits_TE: Tensor

    @property
    def probabilities_TE(self) -> Tensor:
        """alpha = softmax(W_g x), float32 [T, E]."""
        return self.logits_TE.softmax(dim=-1)

    @property
    def gates_TE(self) -> Tensor:
        """Every expert's weight, float32 [T, E]: 0 where it is not chosen."""
        return torch.zeros_like(self.logits_TE).index_put((self.token_A, self.expert_A), self.gate_A)

    def weighed(self, weights_E: Tensor) -> UnevenRouting:
        """As Routing.weighed."""
        return replace(self, gate_A=self.gate_A * weights_E[self.expert_A])


def check_top_k(top_k: int, experts: int) -> None:
    """Raises ValueError unless 0 <= top_k <= experts."""
    if not 0 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; expected 0 to {experts}, the number of experts.")


def route_top_k(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, *, top_k: int, gate: Gate) -> Routing:
    """Eq. 3: the top_k experts of alpha = softmax(W_g x), in float32 whatever the dtypes of x and W_g.

    gate.mode `sum`: every chosen expert has weight 1. `normalised`: gate.scale * alpha_i / sum of the
    chosen alphas, through which the router learns. Equal logits go to the lower expert index, on every
    device. Raises ValueError for a top_k outside 0 ... E.
    """
    check_top_k(top_k, weight_EH.shape[0])
    logits_TE = float32_linear(x_TH, weight_EH, bias_E)
    # Stable, since torch.topk promises no order among ties. Logits order as their softmax does.
    experts_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if gate.mode == "sum":
        gates_TK = torch.ones_like(experts_TK, dtype=torch.float32)
    else:
        # Renormalising a softmax over the chosen is the softmax of their logits.
        gates_TK = gate.scale * logits_TE.gather(-1, experts_TK).softmax(dim=-1)
    return Routing(experts_TK=experts_TK, gates_TK=gates_TK, logits_TE=logits_TE)


def float32_linear(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None) -> Tensor:
    """W x + b in float32, under autocast too. A CPU takes a thousand tokens at a time, to stay in its cache."""
    weight_EH, bias_E = weight_EH.float(), None if bias_E is None else bias_E.float()
    parts = x_TH.split(1024) if x_TH.is_cpu and x_TH.shape[0] > 1024 else (x_TH,)
    device = x_TH.device.type
    # Not always off: some devices know no autocast, and torch refuses to turn off what is not there.
    off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with off:
        outputs = [F.linear(part_TH.float(), weight_EH, bias_E) for part_TH in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

"""Result of a token router: which experts each token goes to, and with what weight.

Shapes: T tokens, H hidden size, E experts, K experts of a token, A assignments (a token at one of its experts).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GateMode = Literal["sum", "normalised"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Gate:
    """`sum`: every chosen expert has weight 1. `normalised`: scale * g_i, where g sums to 1 over the chosen (Eq. 3)."""

    mode: GateMode
    scale: float


class SortedRows(NamedTuple):
    """Assignments sorted by expert, then by token. Row a is assignment slot_A[a], of token token_A[a], both int64 [A].

    Expert e's rows end at ends_E[e], int32 [E].
    """

    token_A: Tensor
    slot_A: Tensor
    ends_E: Tensor


@dataclass(kw_only=True, slots=True)
class Routing:
    """Assignments of tokens to experts, sorted by token.

    token_A, expert_A  int64 [A]
    gate_A             float32 [A], weight of the expert's output for the token
    logits_TE          float32 [T, E], of the router's softmax
    per_token          K, if every token has as many experts; a token's experts then stand best first
    rows               the assignments sorted by expert, where the router has sorted them already
    ends_T             int64 [T] on the host, where the assignments of each token end; None unless the host knows it
    gate_unit          gates of mode `normalised` are this number times a share from 0 to 1; None: times alpha, which is
                       softmax(logits), and a factor that traces leave out
    """

    token_A: Tensor
    expert_A: Tensor
    gate_A: Tensor
    logits_TE: Tensor
    per_token: int | None = None
    gate_unit: float | None = None
    rows: SortedRows | None = None
    ends_T: Tensor | None = None

    @classmethod
    def even(
        cls,
        experts_TK: Tensor,
        gates_TK: Tensor,
        logits_TE: Tensor,
        gate_unit: float | None = None,
        rows: SortedRows | None = None,
    ) -> Routing:
        """Routing that gives every token K experts, best first."""
        per_token = experts_TK.shape[1]
        assignments = torch.arange(experts_TK.numel(), device=experts_TK.device)
        return cls(
            token_A=assignments // max(1, per_token),
            expert_A=experts_TK.flatten(),
            gate_A=gates_TK.flatten(),
            logits_TE=logits_TE,
            per_token=per_token,
            gate_unit=gate_unit,
            rows=rows,
        )

    @property
    def experts_TK(self) -> Tensor:
        """Experts of every token, int64 [T, K]. Only where all tokens have K."""
        return self.expert_A.view(self.logits_TE.shape[0], self._even())

    @property
    def gates_TK(self) -> Tensor:
        """Weights of these experts, float32 [T, K]."""
        return self.gate_A.view(self.logits_TE.shape[0], self._even())

    @property
    def probabilities_TE(self) -> Tensor:
        """alpha = softmax(W_g x), float32 [T, E]: read by the balance loss and by traces."""
        return self.logits_TE.softmax(dim=-1)

    @property
    def gates_TE(self) -> Tensor:
        """Weight of every expert, float32 [T, E]; 0 for an expert that is not chosen."""
        return torch.zeros_like(self.logits_TE).index_put((self.token_A, self.expert_A), self.gate_A)

    def weighed(self, weights_E: Tensor) -> Routing:
        """The same assignments, their gates multiplied by the experts' weights; 0 mutes an expert."""
        return replace(self, gate_A=self.gate_A * weights_E[self.expert_A])

    def on(self, device: torch.device) -> Routing:
        """The same routing with its tensors on `device`."""
        return replace(
            self,
            token_A=self.token_A.to(device),
            expert_A=self.expert_A.to(device),
            gate_A=self.gate_A.to(device),
            logits_TE=self.logits_TE.to(device),
            rows=None if self.rows is None else SortedRows(*(tensor.to(device) for tensor in self.rows)),
        )

    def _even(self) -> int:
        assert self.per_token is not None
        return self.per_token


def float32_linear(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None) -> Tensor:
    """W x + b in float32, under autocast too. On the CPU a thousand tokens at a time, which stay in its cache."""
    weight_EH, bias_E = weight_EH.float(), None if bias_E is None else bias_E.float()
    parts = x_TH.split(1024) if x_TH.is_cpu and x_TH.shape[0] > 1024 else (x_TH,)
    device = x_TH.device.type
    # Switched off only where it is on: torch refuses to switch autocast off on devices that do not have it.
    off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with off:
        outputs = [F.linear(part_TH.float(), weight_EH, bias_E) for part_TH in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

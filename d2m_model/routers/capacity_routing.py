"""Routing by DiffMoE's capacity router: experts take tokens, so one token may get more experts than another.

In training every expert takes its best tokens of one pool, the batch. Its share is fixed, and the batch's hardest
tokens get the most experts. At inference every token is routed by itself: a small predictor has learnt which experts
would take the token, and an expert takes it if the prediction passes the expert's threshold.

Where the paper (Shi et al. 2025) leaves something open, this follows its official code. The scale of the gates is our
addition: without renormalisation over the chosen experts, a softmax over n experts has gates near 1/n.

Shapes: T tokens, P of them in the pool, S tokens of an expert, H hidden size, D predictor width, E experts, A assignments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host_copy import HostCopy
from .routing import Gate, Routing, float32_linear

THRESHOLD_DECAY = 0.95  # DiffMoE's


@dataclass(kw_only=True, slots=True)
class CapacityTensors:
    """Tensors of one FFN's capacity router beside W_g."""

    in_weight_DH: Tensor
    in_bias_D: Tensor
    out_weight_ED: Tensor
    out_bias_E: Tensor
    threshold_E: Tensor  # probabilities
    scale_1: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> CapacityTensors:
        """Select them from a router's tensors, which are named as in the file after the FFN's name."""
        return cls(**{field: tensors[name] for field, name in _NAMES.items()})

    def named(self) -> dict[str, Tensor]:
        """Return them by these names."""
        return {name: getattr(self, field) for field, name in _NAMES.items()}


_NAMES = {
    "in_weight_DH": "capacity.in_layer.weight",
    "in_bias_D": "capacity.in_layer.bias",
    "out_weight_ED": "capacity.out_layer.weight",
    "out_bias_E": "capacity.out_layer.bias",
    "scale_1": "capacity.scale",
    "threshold_E": "threshold",
}


def predict(x_TH: Tensor, tensors: CapacityTensors) -> Tensor:
    """Return the predictor's logits, float32 [T, E]: their sigmoid is the probability that an expert takes the token.

    x is detached, so that the predictor does not change the model that it observes.
    """
    hidden_TD = F.silu(float32_linear(x_TH.detach(), tensors.in_weight_DH, tensors.in_bias_D))
    return float32_linear(hidden_TD, tensors.out_weight_ED, tensors.out_bias_E)


# Inference


def check_factor(factor: float) -> None:
    """Raise ValueError unless the capacity factor is 0 or more, and finite."""
    if not 0 <= factor < math.inf:
        raise ValueError(f"The capacity factor is {factor}; expected 0 (no experts) or more (1 is the file's own).")


def route_by_threshold(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    tensors: CapacityTensors,
    *,
    gate: Gate,
    factor: float = 1.0,
) -> Routing:
    """Route each token to the experts whose prediction passes their threshold.

    gate.mode `sum`: weight 1. `normalised`: the FFN's scale times alpha = softmax(W_g x), not renormalised; gate.scale
    is not used. `factor`, the compute slider, divides the odds t / (1 - t) of the thresholds: at 1 they are the file's,
    at 2 a prediction passes at half the odds, at 0 none does. (If the factor divided t itself, experts would drop out
    one after the other below 1, when their thresholds exceed 1.)

    Raises ValueError for a factor that is negative or not finite.
    """
    return begin_by_threshold(x_TH, weight_EH, bias_E, tensors, gate=gate, factor=factor)()


def begin_by_threshold(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    tensors: CapacityTensors,
    *,
    gate: Gate,
    factor: float,
) -> Callable[[], Routing]:
    """Start `route_by_threshold`, and return a function that returns its routing.

    Only the device knows the number of assignments. The host waits for it in that function, once per call, and
    torch.compile breaks its graph there. The alternative, rows for every token at every expert, would need E / K times the
    memory of top-k routing.
    """
    check_factor(factor)
    logits_TE = float32_linear(x_TH, weight_EH, bias_E)
    # Compare logits, because sigmoids may round to 0 or 1. A threshold of 0 has the logit -inf, which all pass.
    limit_E = tensors.threshold_E.float().logit() - (math.log(factor) if factor > 0 else -math.inf)
    chosen_TE = predict(x_TH, tensors) > limit_E
    gates_TE = _weights(logits_TE.softmax(dim=-1), tensors.scale_1, gate)
    if not chosen_TE.is_cpu:
        return listed_in_room(chosen_TE, gates_TE, logits_TE)
    token_A, expert_A = chosen_TE.nonzero().unbind(1)
    routing = Routing(token_A=token_A, expert_A=expert_A, gate_A=gates_TE[token_A, expert_A], logits_TE=logits_TE)
    return lambda: routing


def listed_in_room(chosen_TE: Tensor, gates_TE: Tensor, logits_TE: Tensor) -> Callable[[], Routing]:
    """List the chosen pairs of token and expert in room for all pairs, and return a function that returns the routing.

    Only that function waits for the device, for the number of pairs, which is all that the host needs to know.
    """
    experts, pairs = chosen_TE.shape[1], chosen_TE.numel()
    chosen_R = chosen_TE.flatten()
    end_R = chosen_R.cumsum(0)
    place_R = torch.where(chosen_R, end_R - 1, pairs)  # all others go to one row after the last
    pair_R = end_R.new_zeros(pairs + 1).scatter(0, place_R, torch.arange(pairs, device=end_R.device))[:pairs]
    token_R, expert_R, gate_R = pair_R // experts, pair_R % experts, gates_TE.flatten().index_select(0, pair_R)
    copied_T = HostCopy(end_R.view(chosen_TE.shape)[:, -1])

    def routing() -> Routing:
        ends_T = copied_T.wait()
        rows = slice(0, int(ends_T[-1]) if len(ends_T) else 0)
        return Routing(
            token_A=token_R[rows], expert_A=expert_R[rows], gate_A=gate_R[rows], logits_TE=logits_TE, ends_T=ends_T
        )  # fmt: skip

    return routing


def scaled_threshold(threshold_E: Tensor, factor: float) -> Tensor:
    """Return the thresholds, in their dtype, that have the same effect at factor 1 as `threshold_E` has at `factor`.

    They are equal except for the rounding of the thresholds. Raises ValueError as `check_factor` does.
    """
    check_factor(factor)
    if factor == 0:
        return torch.ones_like(threshold_E)
    return (threshold_E.double().logit() - math.log(factor)).sigmoid().to(threshold_E.dtype)


def _weights(alpha_TE: Tensor, scale_1: Tensor, gate: Gate) -> Tensor:
    return torch.ones_like(alpha_TE) if gate.mode == "sum" else scale_1.float() * alpha_TE


# Training


@dataclass(kw_only=True, slots=True)
class PoolRouting:
    """Routing of a pool, with the predictor's logits, float32 [P, E], and the experts' selection, bool [P, E]."""

    routing: Routing
    predicted_PE: Tensor
    selected_PE: Tensor
    share: int  # S, tokens of each expert

    def predictor_loss(self) -> Tensor:
        """Return the binary cross-entropy of prediction and selection, averaged over tokens and experts."""
        loss = F.binary_cross_entropy_with_logits(self.predicted_PE, self.selected_PE.float(), reduction="sum")
        return loss / max(1, self.selected_PE.numel())


def share_of(tokens: int, experts: int, capacity: float) -> int:
    """Return floor(tokens / experts * capacity), the tokens of a pool that each expert takes; at most all of them."""
    return min(tokens, math.floor(tokens * capacity / experts))


def select(alpha_PE: Tensor, capacity: float) -> Tensor:
    """Return every expert's tokens of the pool, int64 [S, E], best first; among equals the earlier token."""
    share = share_of(alpha_PE.shape[0], alpha_PE.shape[1], capacity)
    return alpha_PE.detach().sort(dim=0, descending=True, stable=True).indices[:share]


def route_pool(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    tensors: CapacityTensors,
    *,
    gate: Gate,
    capacity: float,
    pool_P: Tensor | None = None,
) -> PoolRouting:
    """Let every expert take its share of the pool (None: all tokens), the tokens with the highest alpha = softmax(W_g x).

    The router learns through gates of mode `normalised` (scale * alpha, as in `route_by_threshold`). `pool_P` is
    `pool_of` a mask; tokens outside of it get no expert. Shapes depend only on its length, so the host does not wait.
    """
    logits_TE = float32_linear(x_TH, weight_EH, bias_E)
    logits_PE, x_PH = (logits_TE, x_TH) if pool_P is None else (logits_TE[pool_P], x_TH[pool_P])
    experts = logits_PE.shape[1]
    alpha_PE = logits_PE.softmax(dim=-1)
    taken_SE = select(alpha_PE, capacity)
    # Sorted by token, then by expert.
    flat_A = (taken_SE * experts + torch.arange(experts, device=x_TH.device)).flatten().sort().values
    position_A = flat_A // experts
    routing = Routing(
        token_A=position_A if pool_P is None else pool_P.index_select(0, position_A),
        expert_A=flat_A % experts,
        gate_A=_weights(alpha_PE, tensors.scale_1, gate).flatten().index_select(0, flat_A),
        logits_TE=logits_TE,
    )
    return PoolRouting(
        routing=routing,
        predicted_PE=predict(x_PH, tensors),
        selected_PE=torch.zeros_like(alpha_PE, dtype=torch.bool).scatter(0, taken_SE, True),
        share=taken_SE.shape[0],
    )


@torch.no_grad()
def updated_threshold(threshold_E: Tensor, pooled: PoolRouting | None) -> Tensor:
    """The thresholds, float32, after one more pool: a running mean of the prediction that gives an expert its share.

    That prediction is the S-th highest sigmoid: whatever the predictor's errors, as many tokens pass as the expert took.
    Without a pool (None), or with one too small for a share, the thresholds stay as they are.
    """
    updated_E = threshold_E.float()
    if pooled is None or pooled.share == 0:
        return updated_E
    last_E = pooled.predicted_PE.topk(pooled.share, dim=0).values[-1].sigmoid()
    return THRESHOLD_DECAY * updated_E + (1 - THRESHOLD_DECAY) * last_E

"""DiffMoE's token router: experts take tokens, so one token may get more experts than another.

In training every expert takes its best tokens of one pool, the batch: its share is known, the batch's hardest tokens
get the most experts. Alone, a token cannot know what its batch would have left for it: a small predictor learns to,
and at inference each expert takes the tokens for which its prediction passes a threshold. No token sees another then.

What the paper (Shi et al. 2025) leaves open is decided as in its official code. The gates' scale is ours: a softmax over
n experts, not renormalised over the chosen, leaves gates near 1/n.

Shapes: T tokens, P of them in the pool, S tokens of an expert, H hidden size, D predictor width, E experts, A assignments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
        """From tensors by their names in the file after the FFN's, among them these."""
        return cls(**{field: tensors[name] for field, name in _NAMES.items()})

    def named(self) -> dict[str, Tensor]:
        """By these names."""
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
    """The predictor's logits, float32 [T, E]: their sigmoid is how likely an expert would take the token.

    x is detached: the predictor watches, and does not shape what it watches.
    """
    hidden_TD = F.silu(float32_linear(x_TH.detach(), tensors.in_weight_DH, tensors.in_bias_D))
    return float32_linear(hidden_TD, tensors.out_weight_ED, tensors.out_bias_E)


# Inference


def check_factor(factor: float) -> None:
    """Raises ValueError unless the capacity factor is 0 or more, and finite."""
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
    """The experts whose prediction for a token passes their threshold, token by token.

    gate.mode `sum`: weight 1. `normalised`: the FFN's scale times alpha = softmax(W_g x), not renormalised; gate.scale
    is not used. `factor`, the compute slider, divides the odds t / (1 - t) of the thresholds: at 1 they are the file's,
    at 2 a prediction passes at half the odds, at 0 none does. (If it divided t itself, experts would fall silent one
    after the other below 1, as their thresholds came to exceed 1.)

    How many assignments there are only the device knows: the host waits for it, once each call, and torch.compile
    breaks its graph here. The alternative, rows for every token at every expert of which most are unused, would gather
    and scatter E / K times the memory of top-k routing.
    Raises ValueError for a factor below 0, or one that is no finite number.
    """
    check_factor(factor)
    logits_TE = float32_linear(x_TH, weight_EH, bias_E)
    # In logits, where sigmoids do not yet round to 0 or 1. Of a threshold of 0 the logit is -inf, which all pass.
    limit_E = tensors.threshold_E.float().logit() - (math.log(factor) if factor > 0 else -math.inf)
    token_A, expert_A = (predict(x_TH, tensors) > limit_E).nonzero().unbind(1)
    gates_TE = _weights(logits_TE.softmax(dim=-1), tensors.scale_1, gate)
    return Routing(token_A=token_A, expert_A=expert_A, gate_A=gates_TE[token_A, expert_A], logits_TE=logits_TE)


def scaled_threshold(threshold_E: Tensor, factor: float) -> Tensor:
    """The thresholds, in their dtype, with which `route_by_threshold` at factor 1 does what it does with `threshold_E`
    at `factor` (but for the rounding of the thresholds themselves). Raises ValueError as `check_factor` does."""
    check_factor(factor)
    if factor == 0:
        return torch.ones_like(threshold_E)
    return (threshold_E.double().logit() - math.log(factor)).sigmoid().to(threshold_E.dtype)


def _weights(alpha_TE: Tensor, scale_1: Tensor, gate: Gate) -> Tensor:
    return torch.ones_like(alpha_TE) if gate.mode == "sum" else scale_1.float() * alpha_TE


# Training


@dataclass(kw_only=True, slots=True)
class PoolRouting:
    """What the experts took of a pool, and what the predictor made of it: float32 [P, E] logits beside bool [P, E]."""

    routing: Routing
    predicted_PE: Tensor
    selected_PE: Tensor
    share: int  # S, tokens of each expert

    def predictor_loss(self) -> Tensor:
        """Binary cross-entropy of the prediction against the selection, meaned over tokens and experts."""
        loss = F.binary_cross_entropy_with_logits(self.predicted_PE, self.selected_PE.float(), reduction="sum")
        return loss / max(1, self.selected_PE.numel())


def share_of(tokens: int, experts: int, capacity: float) -> int:
    """floor(tokens / experts * capacity): how many tokens of a pool each expert takes. At most all of them."""
    return min(tokens, math.floor(tokens * capacity / experts))


def select(alpha_PE: Tensor, capacity: float) -> Tensor:
    """int64 [S, E]: every expert's tokens of the pool, best first; among equals the earlier token."""
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
    """Every expert takes its share of the pool (None: all tokens): those with the highest alpha = softmax(W_g x).

    Through gates of mode `normalised` (scale * alpha, as in `route_by_threshold`) the router learns. `pool_P` is
    `pool_of` a mask; tokens outside it get no expert. Shapes depend on its length alone, so the host waits for nothing.
    """
    logits_TE = float32_linear(x_TH, weight_EH, bias_E)
    logits_PE, x_PH = (logits_TE, x_TH) if pool_P is None else (logits_TE[pool_P], x_TH[pool_P])
    experts = logits_PE.shape[1]
    alpha_PE = logits_PE.softmax(dim=-1)
    taken_SE = select(alpha_PE, capacity)
    # Sorted by token, then by expert.
    place_A = (taken_SE * experts + torch.arange(experts, device=x_TH.device)).flatten().sort().values
    position_A = place_A // experts
    routing = Routing(
        token_A=position_A if pool_P is None else pool_P.index_select(0, position_A),
        expert_A=place_A % experts,
        gate_A=_weights(alpha_PE, tensors.scale_1, gate).flatten().index_select(0, place_A),
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

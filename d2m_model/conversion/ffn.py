"""Conversion of one dense FFN to a MoE FFN by a recipe (order, router, means, refit), and its error.

Shapes: T tokens of calibration, H hidden size, N = S + E F neurons, S shared, R routed, E experts, F expert width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import FFNLayout
from ..routers import TOP_K_ROUTER, RouterTensors, TokenRouter
from ..routers.token_router import BIAS, WEIGHT
from ..routers.top_k import chosen_top_k
from .coactivation import coactivation_experts
from .interfaces import FFNPlan, FFNWeights
from .least_squares import Normal
from .router_init import RouterInit, centroid_router, random_router, ridge_router
from .split import generator_for, neuron_order, order_of, ranked_neurons

Experts = Literal["coactivation", "dealt", "random"]
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # candidates; the refit takes the one with the least error on unseen tokens
REPORTED = 4  # one token in 4 is held out of every fit, to choose among RIDGES and for the report
MANY = 2048  # tokens processed by an FFN at a time


@dataclass(kw_only=True, slots=True, frozen=True)
class Recipe:
    """Options of a conversion without training. All except `dealt`, `random` and `centroid` need calibration inputs."""

    experts: Experts
    router: RouterInit
    mean: bool  # replace experts that are not chosen by their mean output
    refit: bool  # fit W2 and b2 of the shared expert, in closed form, to the outputs of experts not chosen
    top_k: int  # experts per token, for which clusters, ridge router and refit are made
    seed: int
    token_router: TokenRouter = TOP_K_ROUTER

    @property
    def needs_inputs(self) -> bool:
        fitted = self.mean or self.refit or self.token_router.needs_data
        return self.experts == "coactivation" or self.router == "ridge" or fitted


@dataclass(kw_only=True, slots=True, frozen=True)
class FFNReport:
    """Relative error |found - dense| / |dense| of an FFN's output (b2 aside) at the recipe's top_k, on tokens that no fit
    has seen. The first four are this split under four routers, without refit; `converted` is the FFN as converted.

    `oracle` knows the experts' outputs and chooses greedily. Of a capacity router: how far what its predictor gives the
    experts `agrees` with what they would take of these tokens (2 |both| / (|one| + |other|)), and `experts` of a token.
    """

    random: float
    centroid: float
    ridge: float
    oracle: float
    converted: float
    agrees: float | None = None
    experts: float | None = None

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def plan_without_data(
    name: str, weights: FFNWeights, layout: FFNLayout, importance_N: Tensor, recipe: Recipe
) -> FFNPlan:
    """Plan a MoE FFN from weights and importance alone."""
    assert not recipe.needs_inputs
    assert recipe.experts != "coactivation"
    order_N = neuron_order(importance_N, layout, recipe.experts, generator_for(recipe.seed, f"{name} experts"))
    if recipe.router == "centroid":
        router_EH = centroid_router(weights.up_NH, order_N, layout)
    else:
        router_EH = random_router(layout, weights.up_NH.shape[1], generator_for(recipe.seed, f"{name} router"))
    return FFNPlan(order_N=order_N, router={WEIGHT: router_EH})


def plan_with_data(
    name: str, weights: FFNWeights, layout: FFNLayout, importance_N: Tensor, inputs_TH: Tensor, recipe: Recipe
) -> tuple[FFNPlan, FFNReport]:
    """Plan a MoE FFN with calibration inputs of the FFN. Runs on the device of inputs_TH, in float32.

    Raises ValueError if there are too few inputs to fit and to report.
    """
    if len(inputs_TH) < 2 * REPORTED:
        raise ValueError(f"{name} has {len(inputs_TH)} calibration tokens; expected {2 * REPORTED} or more.")
    dense = _Dense.of(weights, inputs_TH.device)
    # Tokens are in the order of their batches, so the held-out ones come from all batches.
    kept = torch.arange(len(inputs_TH), device=inputs_TH.device) % REPORTED == 0
    fit_TH, rest_TH = inputs_TH[~kept].float(), inputs_TH[kept].float()
    ranked_N = ranked_neurons(importance_N, layout)
    order_N = _order(name, dense, layout, ranked_N, fit_TH, recipe)
    fit = _Split.of(dense, layout, order_N, fit_TH, mean_N=None if recipe.mean else torch.zeros_like(dense.up_bias_N))
    rest = _Split.of(dense, layout, order_N, rest_TH, mean_N=fit.mean_N)

    routers = _routers(name, weights, layout, order_N, fit, recipe)
    errors: dict[str, float] = {
        router: rest.error(rest.missing(rest.chosen(*parameters, recipe.top_k)))
        for router, parameters in routers.items()
    }
    errors["oracle"] = rest.error(rest.missing(rest.best(recipe.top_k)))
    routing = _FittedRouter.of(name, *routers[recipe.router], fit, rest, recipe)
    plan = FFNPlan(
        order_N=order_N,
        router=routing.tensors,
        expert_mean_EH=fit.expert_means() if recipe.mean else None,
    )
    missing_TH = rest.missing(routing.rest_TE)
    if not recipe.refit:
        return plan, FFNReport(**errors, converted=rest.error(missing_TH), **routing.report)

    normal = Normal(fit.shared_TS, fit.missing(routing.fit_TE))
    judge = torch.arange(len(missing_TH), device=missing_TH.device) % 2 == 0
    best = None
    for ridge in RIDGES:
        weight_SH, bias_H = (part.float() for part in normal.solve(ridge))
        left_TH = missing_TH - rest.shared_TS @ weight_SH - bias_H
        judged, reported = float(left_TH[judge].norm()), rest.error(left_TH, ~judge)
        if best is None or judged < best[0]:
            best = judged, reported, weight_SH, bias_H
    assert best is not None
    _, error, weight_SH, bias_H = best
    plan = replace(plan, shared_down_HS=fit.down_HS + weight_SH.T, down_bias_H=dense.down_bias_H + bias_H)
    return plan, FFNReport(**errors, converted=error, **routing.report)


@dataclass(kw_only=True, slots=True, frozen=True)
class _FittedRouter:
    """The file's router of an FFN, and the experts that it gives the tokens of the fit and the rest, bool [T, E]."""

    tensors: RouterTensors
    fit_TE: Tensor
    rest_TE: Tensor
    report: dict[str, float]

    @classmethod
    def of(
        cls, name: str, weight_EH: Tensor, bias_E: Tensor | None, fit: _Split, rest: _Split, recipe: Recipe
    ) -> _FittedRouter:
        router = recipe.token_router
        tensors = {WEIGHT: weight_EH} if bias_E is None else {WEIGHT: weight_EH, BIAS: bias_E}
        there = {part: tensor.to(fit.x_TH) for part, tensor in tensors.items()}
        beside = router.fit(fit.x_TH, there, generator_for(recipe.seed, f"{name} predictor"))
        there |= beside
        fit_TE, rest_TE = (router.chosen(split.x_TH, there, recipe.top_k) for split in (fit, rest))
        report = router.fit_report(rest.x_TH, there, rest_TE)
        return cls(tensors=tensors | beside, fit_TE=fit_TE, rest_TE=rest_TE, report=report)


@dataclass(kw_only=True, slots=True, frozen=True)
class _Dense:
    """The dense FFN in float32."""

    up_NH: Tensor
    up_bias_N: Tensor
    down_HN: Tensor
    down_bias_H: Tensor

    @classmethod
    def of(cls, weights: FFNWeights, device: torch.device) -> _Dense:
        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device, torch.float32)

        return cls(
            up_NH=place(weights.up_NH),
            up_bias_N=place(weights.up_bias_N),
            down_HN=place(weights.down_HN),
            down_bias_H=place(weights.down_bias_H),
        )

    def hidden(self, x_TH: Tensor, neurons: Tensor) -> Tensor:
        """Return gelu_tanh(W1 x + b1) of some neurons, [T, len(neurons)]."""
        up, bias = self.up_NH[neurons], self.up_bias_N[neurons]
        return torch.cat([F.gelu(F.linear(part, up, bias), approximate="tanh") for part in x_TH.split(MANY)])


def _order(name: str, dense: _Dense, layout: FFNLayout, ranked_N: Tensor, x_TH: Tensor, recipe: Recipe) -> Tensor:
    generator = generator_for(recipe.seed, f"{name} experts")
    if recipe.experts != "coactivation":
        importance_N = torch.empty(layout.neurons)
        importance_N[ranked_N] = torch.arange(layout.neurons, 0, -1.0)
        return neuron_order(importance_N, layout, recipe.experts, generator)
    routed_R = ranked_N[layout.shared :].to(x_TH.device)
    hidden_TR = dense.hidden(x_TH, routed_R)
    if recipe.mean or recipe.refit:  # the mean output is added for every token
        hidden_TR -= hidden_TR.mean(0)
    energy_TR = hidden_TR.square_().mul_(dense.down_HN[:, routed_R].square().sum(0))
    expert_R = coactivation_experts(energy_TR, x_TH, layout, recipe.top_k, generator)
    return order_of(ranked_N, expert_R.cpu(), layout)


@dataclass(kw_only=True, slots=True, frozen=True)
class _Split:
    """Activations of a split FFN on some tokens."""

    layout: FFNLayout
    x_TH: Tensor
    down_HS: Tensor
    down_HR: Tensor
    shared_TS: Tensor  # hidden activations of the shared expert
    routed_TR: Tensor  # those of the routed experts, less mean_N
    mean_N: Tensor  # mean activations by position in the new order; zeros if experts are not replaced by their means
    dense_norm_T: Tensor

    @classmethod
    def of(cls, dense: _Dense, layout: FFNLayout, order_N: Tensor, x_TH: Tensor, mean_N: Tensor | None) -> _Split:
        """Compute them. `mean_N` None takes the means of these tokens."""
        order = order_N.long().to(x_TH.device)
        shared_S, routed_R = order[: layout.shared], order[layout.shared :]
        shared_TS, routed_TR = dense.hidden(x_TH, shared_S), dense.hidden(x_TH, routed_R)
        down_HS, down_HR = dense.down_HN[:, shared_S], dense.down_HN[:, routed_R]
        dense_norm_T = (shared_TS @ down_HS.T + routed_TR @ down_HR.T).norm(dim=1)
        if mean_N is None:
            mean_N = torch.zeros_like(dense.up_bias_N)
            mean_N[layout.shared :] = routed_TR.mean(0)
        return cls(
            layout=layout,
            x_TH=x_TH,
            down_HS=down_HS,
            down_HR=down_HR,
            shared_TS=shared_TS,
            routed_TR=routed_TR - mean_N[layout.shared :],
            mean_N=mean_N,
            dense_norm_T=dense_norm_T,
        )

    def expert_means(self) -> Tensor:
        """Return mu_e, the mean output of each expert, float32 [E, H]."""
        weighted_HR = self.down_HR * self.mean_N[self.layout.shared :]
        return weighted_HR.unflatten(1, (self.layout.experts, self.layout.width)).sum(2).T.contiguous()

    def norms_TE(self) -> Tensor:
        """Return |E_e(x) - mu_e| of every expert, [T, E]."""
        experts = zip(self.routed_TR.split(self.layout.width, 1), self.down_HR.split(self.layout.width, 1), strict=True)
        return torch.stack([(hidden_TF @ down_HF.T).norm(dim=1) for hidden_TF, down_HF in experts], 1)

    def best(self, top_k: int) -> Tensor:
        """Return a greedy choice of top_k experts, bool [T, E]: each time the one that leaves the least error."""
        chosen = []
        for part_TR in self.routed_TR.split(MANY // self.layout.experts):
            outputs_TEH = torch.einsum(
                "tef,hef->teh",
                part_TR.unflatten(1, (self.layout.experts, self.layout.width)),
                self.down_HR.unflatten(1, (self.layout.experts, self.layout.width)),
            )
            missing_TH = outputs_TEH.sum(1)
            chosen_TE = torch.zeros_like(outputs_TEH[..., 0], dtype=torch.bool)
            for _ in range(top_k):
                left_TE = (missing_TH[:, None] - outputs_TEH).square().sum(2)
                pick_T1 = left_TE.masked_fill(chosen_TE, torch.inf).argmin(1, keepdim=True)
                chosen_TE.scatter_(1, pick_T1, True)
                missing_TH = missing_TH - outputs_TEH.take_along_dim(pick_T1[..., None], 1)[:, 0]
            chosen.append(chosen_TE)
        return torch.cat(chosen)

    def chosen(self, weight_EH: Tensor, bias_E: Tensor | None, top_k: int) -> Tensor:
        """Return the choice of a top-k router, bool [T, E]."""
        return chosen_top_k(self.x_TH, weight_EH, bias_E, top_k)

    def missing(self, chosen_TE: Tensor) -> Tensor:
        """Return the output of the experts not chosen beyond their means, [T, H]."""
        return (self.routed_TR * (~chosen_TE).repeat_interleave(self.layout.width, dim=1)) @ self.down_HR.T

    def error(self, left_TH: Tensor, tokens: Tensor | slice = slice(None)) -> float:
        """Return the error relative to the dense output, over all the tokens together."""
        return float(left_TH[tokens].norm() / self.dense_norm_T[tokens].norm())


def _routers(
    name: str, weights: FFNWeights, layout: FFNLayout, order_N: Tensor, fit: _Split, recipe: Recipe
) -> dict[RouterInit, tuple[Tensor, Tensor | None]]:
    """Return each kind of initial router: weight [E, H] and bias [E], float32."""
    generator = generator_for(recipe.seed, f"{name} router")
    return {
        "random": (random_router(layout, weights.up_NH.shape[1], generator), None),
        "centroid": (centroid_router(weights.up_NH, order_N, layout), None),
        "ridge": ridge_router(fit.x_TH, fit.norms_TE()),
    }

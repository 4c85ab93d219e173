"""Effect of a conversion without training on one FFN and on the modulations, against its own claims."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2m_model.config import FFNLayout, Gate
from d2m_model.conversion.adaln import FittedModulations, VecMoments
from d2m_model.conversion.coactivation import balanced_assignment, coactivation_experts
from d2m_model.conversion.ffn import Recipe, plan_with_data, plan_without_data
from d2m_model.conversion.interfaces import FFNPlan, FFNWeights
from d2m_model.conversion.least_squares import Normal
from d2m_model.conversion.router_init import ridge_router
from d2m_model.moe import moe_ffn
from d2m_model.routers.token_router import BIAS, WEIGHT

H, LAYOUT = 32, FFNLayout(shared=32, experts=6, width=16)
TEACHER = Recipe(experts="random", router="random", mean=False, refit=False, top_k=2, seed=0)
BEST = Recipe(experts="coactivation", router="ridge", mean=True, refit=True, top_k=2, seed=0)


def topics(tokens: int, seed: int = 1) -> Tensor:
    """Inputs of six kinds, [tokens, H]: each token is near one of six directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.init.orthogonal_(torch.empty(6, H), generator=torch.Generator().manual_seed(9)) * 4
    return centres[torch.randint(6, (tokens,), generator=generator)] + 0.3 * torch.randn(tokens, H, generator=generator)


def topical_ffn(seed: int = 0) -> FFNWeights:
    """Most neurons fire for one of the topics, in no order."""
    generator = torch.Generator().manual_seed(seed)
    centres = (
        topics(1) * 0
        + torch.nn.init.orthogonal_(torch.empty(6, H), generator=torch.Generator().manual_seed(9)).repeat(22, 1)[
            : LAYOUT.neurons
        ]
    )
    centres = centres[torch.randperm(LAYOUT.neurons, generator=generator)]
    return FFNWeights(
        up_NH=centres + 0.1 * torch.randn(LAYOUT.neurons, H, generator=generator),
        up_bias_N=torch.randn(LAYOUT.neurons, generator=generator) * 0.1 - 1,
        down_HN=torch.randn(H, LAYOUT.neurons, generator=generator) * 0.2,
        down_bias_H=torch.randn(H, generator=generator),
    )


IMPORTANCE = torch.rand(LAYOUT.neurons, generator=torch.Generator().manual_seed(2))


def dense(weights: FFNWeights, x_TH: Tensor) -> Tensor:
    hidden_TN = F.gelu(F.linear(x_TH, weights.up_NH, weights.up_bias_N), approximate="tanh")
    return F.linear(hidden_TN, weights.down_HN, weights.down_bias_H)


def converted(weights: FFNWeights, plan: FFNPlan, x_TH: Tensor, top_k: int) -> Tensor:
    """The FFN that a reader of the file computes."""
    order = plan.order_N.long()
    down_HN = weights.down_HN[:, order].clone()
    if plan.shared_down_HS is not None:
        down_HN[:, : LAYOUT.shared] = plan.shared_down_HS
    return moe_ffn(
        x_TH,
        weights.up_NH[order],
        weights.up_bias_N[order],
        down_HN,
        weights.down_bias_H if plan.down_bias_H is None else plan.down_bias_H,
        plan.router[WEIGHT],
        plan.router.get(BIAS),
        plan.expert_mean_EH,
        layout=LAYOUT,
        gate=Gate(mode="sum", scale=1.0),
        top_k=top_k,
    )


def error(weights: FFNWeights, plan: FFNPlan, x_TH: Tensor, top_k: int = 2) -> float:
    """Return the relative error as FFNReport defines it."""
    expected = dense(weights, x_TH)
    return float((converted(weights, plan, x_TH, top_k) - expected).norm() / (expected - weights.down_bias_H).norm())


def recipe(**changes: object) -> Recipe:
    from dataclasses import replace

    return replace(TEACHER, **changes)  # type: ignore[arg-type]


# Clusters


def test_neurons_that_fire_together_become_one_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    group_R = torch.arange(96)[torch.randperm(96, generator=generator)] % 6
    topic_T = torch.randint(6, (600,), generator=generator)
    energy_TR = (topic_T[:, None] == group_R).float() + 0.01 * torch.rand(600, 96, generator=generator)
    x_TH = F.one_hot(topic_T, H).float()
    expert_R = coactivation_experts(energy_TR, x_TH, LAYOUT, 1, torch.Generator().manual_seed(1))
    assert torch.bincount(expert_R).tolist() == [16] * 6
    found = {frozenset((expert_R == e).nonzero().flatten().tolist()) for e in range(6)}
    assert found == {frozenset((group_R == g).nonzero().flatten().tolist()) for g in range(6)}


def test_no_exchange_of_two_neurons_raises_the_gain_of_a_balanced_assignment() -> None:
    generator = torch.Generator().manual_seed(0)
    gain_RE = torch.rand(24, 4, generator=generator)
    expert_R = balanced_assignment(gain_RE, torch.arange(24) % 4)
    assert torch.bincount(expert_R).tolist() == [6] * 4
    for i in range(24):
        for j in range(24):
            a, b = expert_R[i], expert_R[j]
            assert gain_RE[i, b] + gain_RE[j, a] <= gain_RE[i, a] + gain_RE[j, b] + 1e-5


# Regressions


def test_ridge_is_least_squares_as_it_goes_to_nothing_and_shrinks_as_it_grows() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_IO = torch.randn(200, 5, generator=generator) * 3, torch.randn(5, 2, generator=generator)
    y_TO = x_TI @ weight_IO + torch.tensor([1.0, -2.0])
    normal = Normal(x_TI, y_TO)
    weight, intercept = normal.solve(1e-9)
    torch.testing.assert_close(weight.float(), weight_IO)
    torch.testing.assert_close(intercept.float(), torch.tensor([1.0, -2.0]))
    half, _ = normal.solve(1.0)
    assert 0.4 < float(half.norm() / weight.norm()) < 0.6


def test_an_input_that_never_varies_does_no_harm() -> None:
    x_TI = torch.randn(50, 3)
    x_TI[:, 1] = 7
    weight, intercept = Normal(x_TI, x_TI[:, :1]).solve(1e-6)
    assert torch.cat([weight.flatten(), intercept]).isfinite().all()


def test_the_ridge_router_prefers_the_expert_with_the_larger_output() -> None:
    x_TH = topics(2000)
    target_HE = torch.randn(H, 6, generator=torch.Generator().manual_seed(3))
    norm_TE = (x_TH @ target_HE + 5).clamp_min(0)
    weight_EH, bias_E = ridge_router(x_TH[:1500], norm_TE[:1500])
    logits_TE = F.linear(x_TH[1500:], weight_EH, bias_E)
    assert float((logits_TE.argmax(1) == norm_TE[1500:].argmax(1)).float().mean()) > 0.9
    assert 0.9 < float(logits_TE.std()) < 1.1


# An FFN


def test_what_the_report_says_is_what_a_reader_of_the_file_gets() -> None:
    """On fresh tokens of the same kind."""
    weights, inputs_TH, fresh_TH = topical_ffn(), topics(1200), topics(1200, seed=5)
    for option in (
        TEACHER,
        recipe(mean=True),
        recipe(router="centroid"),
        BEST,
        recipe(refit=True),
        recipe(router="ridge"),
    ):
        plan, report = plan_with_data("x", weights, LAYOUT, IMPORTANCE, inputs_TH, option)
        assert error(weights, plan, fresh_TH) == pytest.approx(report.converted, rel=0.1)
        if not option.refit:
            assert report.converted == getattr(report, option.router)


def test_each_option_is_worth_something() -> None:
    weights, inputs_TH = topical_ffn(), topics(1200)

    def converted_error(**changes: object) -> float:
        return plan_with_data("x", weights, LAYOUT, IMPORTANCE, inputs_TH, recipe(**changes))[1].converted

    paper = converted_error()
    mean = converted_error(mean=True)
    clustered = converted_error(mean=True, experts="coactivation", router="ridge")
    refit = converted_error(mean=True, experts="coactivation", router="ridge", refit=True)
    assert converted_error(mean=True, router="ridge") < mean < paper
    assert refit < clustered < 0.6 * paper


def test_routers_of_a_report_stand_in_their_order() -> None:
    _, report = plan_with_data("x", topical_ffn(), LAYOUT, IMPORTANCE, topics(1200), BEST)
    assert report.oracle <= report.ridge < report.random
    assert report.converted < report.ridge


def test_all_experts_with_means_and_no_refit_are_the_dense_ffn() -> None:
    weights, fresh_TH = topical_ffn(), topics(50, seed=5)
    option = recipe(mean=True, experts="coactivation", router="ridge")
    plan, _ = plan_with_data("x", weights, LAYOUT, IMPORTANCE, topics(200), option)
    assert plan.shared_down_HS is None
    assert error(weights, plan, fresh_TH, top_k=LAYOUT.experts) <= 1e-5


def test_the_means_are_the_experts_mean_outputs() -> None:
    weights, inputs_TH = topical_ffn(), topics(200)
    plan, _ = plan_with_data("x", weights, LAYOUT, IMPORTANCE, inputs_TH, recipe(mean=True))
    assert plan.expert_mean_EH is not None
    fitted_TH = inputs_TH[torch.arange(200) % 4 != 0]  # every fourth token is kept for the report
    neurons_F = plan.order_N[LAYOUT.shared + 2 * 16 : LAYOUT.shared + 3 * 16].long()
    hidden_TF = F.gelu(F.linear(fitted_TH, weights.up_NH[neurons_F], weights.up_bias_N[neurons_F]), approximate="tanh")
    torch.testing.assert_close(plan.expert_mean_EH[2], (hidden_TF @ weights.down_HN[:, neurons_F].T).mean(0))


def test_the_most_important_neurons_stay_shared_whatever_the_experts() -> None:
    expected = set(IMPORTANCE.topk(LAYOUT.shared).indices.tolist())
    for experts in ("coactivation", "dealt", "random"):
        plan, _ = plan_with_data("x", topical_ffn(), LAYOUT, IMPORTANCE, topics(200), recipe(experts=experts))
        assert set(plan.order_N[: LAYOUT.shared].tolist()) == expected
        assert plan.order_N.sort().values.tolist() == list(range(LAYOUT.neurons))


def test_without_data_the_weights_alone_decide() -> None:
    option = recipe(experts="dealt", router="centroid")
    plan = plan_without_data("x", topical_ffn(), LAYOUT, IMPORTANCE, option)
    with_data, _ = plan_with_data("x", topical_ffn(), LAYOUT, IMPORTANCE, topics(200), option)
    assert torch.equal(plan.order_N, with_data.order_N)
    assert torch.equal(plan.router[WEIGHT], with_data.router[WEIGHT])
    assert plan.expert_mean_EH is plan.shared_down_HS is plan.router.get(BIAS) is None


def test_too_few_calibration_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="7 calibration tokens; expected 8 or more"):
        plan_with_data("x", topical_ffn(), LAYOUT, IMPORTANCE, topics(7), BEST)


# Modulations


def silu_vecs(count: int, seed: int) -> Tensor:
    """Far from isotropic, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(H, H, generator=torch.Generator().manual_seed(8)) * torch.logspace(0, -2, H)
    return torch.randn(count, H, generator=generator) @ shape.T + 1


def modulations() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: (torch.randn(k * H, H, generator=generator) * scale, torch.randn(k * H, generator=generator))
        for name, k, scale in (("a", 6, 1.0), ("b", 3, 30.0))
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def output_errors(fitted: FittedModulations, samples_nH: Tensor) -> dict[str, float]:
    errors = {}
    for name, (weight_OH, bias_O) in modulations().items():
        weight_OA, new_bias_O = fitted.compress(name, weight_OH, bias_O)
        found = F.linear(F.linear(samples_nH, fitted.adaln_in_AH), weight_OA, new_bias_O)
        errors[name] = relative(found, F.linear(samples_nH, weight_OH, bias_O))
    return errors


def test_modulation_errors_are_as_reported_and_fall_with_the_rank() -> None:
    moments = VecMoments.of(silu_vecs(20_000, 1))
    last = 1.0
    for rank in (4, 8, 16, H):
        fitted = FittedModulations(moments, [weight for weight, _ in modulations().values()], rank)
        errors = output_errors(fitted, silu_vecs(5_000, 2))
        for name, found in errors.items():
            assert fitted.errors[name] == pytest.approx(found, rel=0.1, abs=1e-5)
        assert max(errors.values()) < last
        last = max(errors.values())
    assert last < 1e-5  # full rank loses nothing


def test_the_fit_beats_principal_directions_and_no_data() -> None:
    """And a modulation with small weights counts as much as one with large ones."""
    samples = silu_vecs(20_000, 1)
    moments, weights = VecMoments.of(samples), [weight for weight, _ in modulations().values()]
    fitted = output_errors(FittedModulations(moments, weights, 6), silu_vecs(5_000, 2))
    blind = output_errors(FittedModulations(VecMoments.unknown(H), weights, 6), silu_vecs(5_000, 2))
    assert all(fitted[name] < 0.7 * blind[name] for name in fitted)
    assert max(fitted.values()) < 2 * min(fitted.values())


def test_modulations_of_low_rank_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(6 * H, 5, generator=generator) @ torch.randn(5, H, generator=generator)
    for moments in (VecMoments.unknown(H), VecMoments.of(silu_vecs(20_000, 1))):
        fitted = FittedModulations(moments, [low], 5)
        weight_OA, bias_O = fitted.compress("a", low, torch.zeros(6 * H))
        samples_nH = silu_vecs(100, 3)
        found = F.linear(F.linear(samples_nH, fitted.adaln_in_AH), weight_OA, bias_O)
        assert relative(found, samples_nH @ low.T) <= 1e-3


def test_a_rank_beyond_the_hidden_size_is_refused() -> None:
    with pytest.raises(ValueError, match="AdaLN rank is 33; expected 1 to 32"):
        FittedModulations(VecMoments.unknown(H), [torch.randn(H, H)], 33)

"""DiffMoE's router in training: every expert takes its share of the pool, and predictors learn which tokens those are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from d2m_model.config import FFNLayout, Gate
from d2m_model.routers.capacity_routing import (
    predict,
    route_pool,
    select,
    share_of,
    updated_threshold,
)
from d2m_model.routers.token_router import pool_of

from .capacity_reference import (
    LAYOUT,
    NORMALISED,
    SUM,
    double,
    literal_ffn,
    literal_prediction,
    literal_selection,
    normal,
    pooled,
    predictor,
    random_ffn,
    random_tensors,
    routed_by_capacity,
    taken_of,
    update,
    weights_of,
)

# The pool


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 20),
    hidden=st.integers(1, 8),
    experts=st.integers(1, 8),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    gate=st.sampled_from([SUM, NORMALISED]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_every_expert_takes_its_share_of_the_pool_and_gates_are_not_renormalised(
    tokens: int,
    hidden: int,
    experts: int,
    kept: float,
    gate: Gate,
    bias: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    capacity = data.draw(st.sampled_from([0.5, 1.0, float(experts)]) | st.floats(0.125, experts, width=16))
    x, weight = normal(seed, tokens, hidden), normal(seed + 1, experts, hidden)
    bias_E = normal(seed + 2, experts) if bias else None
    keep = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < kept
    tensors = random_tensors(hidden, experts, 4, seed + 3)
    pooled = route_pool(x, weight, bias_E, tensors, gate=gate, capacity=capacity, pool_P=pool_of(keep))
    routing = pooled.routing

    alpha = (x.double() @ weight.double().T + (0 if bias_E is None else bias_E.double())).softmax(dim=1)
    taken = literal_selection(alpha, keep.nonzero().flatten().tolist(), capacity)
    assert taken_of(routing) == taken
    assert pooled.share == share_of(int(keep.sum()), experts, capacity)
    assert all(not taken[t] for t in (~keep).nonzero().flatten().tolist())
    expected = torch.ones_like(routing.gate_A) if gate is SUM else 3 * alpha[routing.token_A, routing.expert_A].float()
    torch.testing.assert_close(routing.gate_A, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.probabilities_TE.double(), alpha, rtol=1e-5, atol=1e-6)
    selected = torch.zeros(tokens, experts).bool()
    selected[routing.token_A, routing.expert_A] = True
    assert torch.equal(pooled.selected_PE, selected[keep])
    torch.testing.assert_close(pooled.predicted_PE, predict(x[keep], tensors))


def test_tokens_that_tie_are_taken_in_their_order() -> None:
    x = torch.tensor([[1.0], [2.0], [1.0], [1.0], [2.0], [1.0]])
    taken_SE = select((x @ torch.tensor([[1.0, -1.0, 0.0]])).softmax(dim=1), 1.5)
    assert taken_SE.T.tolist() == [[1, 4, 0], [0, 2, 3], [0, 2, 3]]


def test_no_capacity_asks_for_more_tokens_than_there_are() -> None:
    assert [share_of(7, 7, capacity) for capacity in (1, 3, 7)] == [1, 3, 7]
    assert [share_of(tokens, 12, 2) for tokens in (0, 5, 6, 4608)] == [0, 0, 1, 768]
    assert share_of(49, 12, 12) == 49


@pytest.mark.parametrize("kept", [0, 7, 13])
def test_padding_gets_no_expert_and_changes_nothing_for_the_others(kept: int) -> None:
    ffn = random_ffn(16, LAYOUT, mean=False)
    layer = routed_by_capacity(ffn, NORMALISED).train()
    keep = torch.arange(13) < kept
    predictor(layer).pool_P = pool_of(keep)
    x = normal(50, 13, 16)
    y, threshold = layer(x), updated_threshold(predictor(layer).threshold, predictor(layer).pooled)
    shared = layer.shared_down(torch.nn.functional.gelu(layer.shared_up(x), approximate="tanh"))
    torch.testing.assert_close(y[~keep], shared[~keep])
    x = torch.where(keep[:, None], x, 100 * normal(51, 13, 16))
    assert torch.equal(layer(x)[keep], y[keep])
    assert torch.equal(updated_threshold(predictor(layer).threshold, predictor(layer).pooled), threshold)
    predictor(layer).pool_P = None
    predictor(layer).capacity = 2.0
    torch.testing.assert_close(layer(x[keep]), y[keep])
    assert pooled(layer).predictor_loss().isfinite()


@pytest.mark.parametrize(("tokens", "capacity"), [(23, 2), (23, 6), (23, 0.5), (1, 2)])
@pytest.mark.parametrize("gate", [SUM, NORMALISED])
@pytest.mark.parametrize("mean", [True, False])
def test_training_results_and_gradients_are_the_equations(tokens: int, capacity: float, gate: Gate, mean: bool) -> None:
    ffn = random_ffn(16, LAYOUT, mean=mean)
    layer = routed_by_capacity(ffn, gate, capacity=capacity).train()
    x = normal(50, tokens, 16).requires_grad_()
    y = layer(x)
    direction = normal(51, tokens, 16)
    y.backward(direction)

    inputs = [None if weight is None else weight.requires_grad_() for weight in weights_of(ffn)]
    x64 = x.detach().double().requires_grad_()
    taken = taken_of(pooled(layer).routing)
    expected = literal_ffn(inputs, LAYOUT, gate, taken)
    y64 = expected(x64)
    y64.backward(direction.double())
    assert ((y.double() - y64).abs() <= expected.rounding(x64.detach(), torch.float32)).all()
    up, _, down, down_bias, router, router_bias, expert_mean, _ = (None if w is None else w.grad for w in inputs)
    assert up is not None
    assert down is not None
    found: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "x": (x.grad, x64.grad),
        "routed_up": (layer.routed_up.grad, up[16:].view(6, 8, 16)),
        "routed_down": (layer.routed_down.grad, down[:, 16:].unflatten(1, (6, 8)).transpose(0, 1)),
        "down_bias": (layer.shared_down.bias.grad, down_bias),
        "router": (layer.router.weight.grad, router),
        "router_bias": (layer.router.bias.grad, router_bias),
        "mean": (None if layer.expert_mean is None else layer.expert_mean.grad, expert_mean),
    }
    for name, (gradient, exactly) in found.items():
        if exactly is None or exactly.abs().max() == 0:  # gates of 1, or nothing routed
            assert gradient is None or gradient.abs().max() == 0, name
            continue
        assert gradient is not None, name
        assert (gradient.double() - exactly).norm() <= 3e-6 * exactly.norm(), name
    if gate is NORMALISED and tokens > 1:
        assert router is not None
        assert router.abs().max() > 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pool_too_small_for_a_share_gives_every_parameter_a_gradient(compiled: bool) -> None:
    """Ranks with such a pool must exchange the gradients that the others have: zeros, but for what stands apart of experts."""
    layout = FFNLayout(shared=16, experts=12, width=8)
    layer = routed_by_capacity(random_ffn(16, layout, mean=False), NORMALISED, layout).train()
    forward = torch.compile(layer, backend="aot_eager", dynamic=False) if compiled else layer
    y = forward(normal(50, 5, 16))
    assert pooled(layer).share == 0
    (y.sum() + pooled(layer).predictor_loss()).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    zero = {name for name, gradient in gradients.items() if gradient is not None and not gradient.any()}
    assert zero == {"routed_up", "routed_up_bias", "routed_down", "router.weight", "router.bias"}


def test_training_waits_for_nothing_from_the_device() -> None:
    """Fake tensors have no values to wait for."""
    with FakeTensorMode():
        layer = routed_by_capacity(random_ffn(16, LAYOUT), NORMALISED).train()
        for pool_P in (None, torch.arange(30)):
            predictor(layer).pool_P = pool_P
            y = layer(torch.randn(2, 20, 16))
            (y.sum() + pooled(layer).predictor_loss()).backward()
            assert y.shape == (2, 20, 16)
        assert all(parameter.grad is not None for parameter in layer.parameters())
        update(layer)


# The predictor and its thresholds


@settings(max_examples=30)
@given(tokens=st.integers(1, 12), capacity=st.floats(0.2, 4), seed=st.integers(0, 2**31))
def test_the_loss_is_the_cross_entropy_and_the_threshold_the_mean_of_the_last_that_pass(
    tokens: int, capacity: float, seed: int
) -> None:
    x, weight, tensors = normal(seed, tokens, 5), normal(seed + 1, 4, 5), random_tensors(5, 4, 3, seed + 2)
    pooled = route_pool(x, weight, None, tensors, gate=SUM, capacity=capacity)
    p = torch.stack([literal_prediction(x_H, double(tensors)) for x_H in x.double()])
    taken = taken_of(pooled.routing)
    terms = [-torch.log(p[t, e] if e in taken[t] else 1 - p[t, e]) for t in range(tokens) for e in range(4)]
    torch.testing.assert_close(pooled.predictor_loss().double(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)

    threshold = updated_threshold(tensors.threshold_E, pooled)
    for e in range(4):
        last = sorted(p[:, e].tolist(), reverse=True)[pooled.share - 1] if pooled.share else None
        before = tensors.threshold_E[e].item()
        assert threshold[e].item() == pytest.approx(before if last is None else 0.95 * before + 0.05 * last, rel=1e-4)


def test_the_predictor_learns_from_its_loss_and_nothing_else_does() -> None:
    layer = routed_by_capacity(random_ffn(16, LAYOUT), NORMALISED).train()
    x = normal(50, 64, 16).requires_grad_()
    optimizer = torch.optim.Adam(predictor(layer).parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        layer.route(x)
        loss = pooled(layer).predictor_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        update(layer)
    assert losses[-1] < 0.4 * losses[0]
    assert x.grad is None
    assert layer.router.weight.grad is None

    # And then it gives at inference what the experts took in training.
    taken = layer.eval().route(x)
    wanted = layer.train().route(x)
    agreement = ((taken.gates_TE > 0) == (wanted.gates_TE > 0)).float().mean()
    assert agreement > 0.9
    assert len(taken.token_A) == pytest.approx(2 * 64, rel=0.15)


def test_an_empty_pool_has_no_loss_and_leaves_thresholds_alone() -> None:
    tensors = random_tensors(5, 4, 3)
    for tokens in (0, 1):  # of which one is too few for a share
        pooled = route_pool(normal(0, tokens, 5), normal(1, 4, 5), None, tensors, gate=NORMALISED, capacity=2)
        assert pooled.share == 0
        assert len(pooled.routing.token_A) == 0
        assert torch.equal(updated_threshold(tensors.threshold_E, pooled), tensors.threshold_E)
    assert route_pool(normal(0, 0, 5), normal(1, 4, 5), None, tensors, gate=SUM, capacity=2).predictor_loss() == 0


def test_a_rank_that_saw_no_pool_keeps_its_thresholds() -> None:
    tensors = random_tensors(5, 4, 3)
    pooled = route_pool(normal(0, 12, 5), normal(1, 4, 5), None, tensors, gate=SUM, capacity=2)
    assert torch.equal(updated_threshold(tensors.threshold_E, None), tensors.threshold_E)
    assert not torch.equal(updated_threshold(tensors.threshold_E, pooled), tensors.threshold_E)


def test_recomputing_a_forward_does_not_move_thresholds_twice() -> None:
    thresholds = []
    for recomputed in (False, True):
        layer = routed_by_capacity(random_ffn(16, LAYOUT), NORMALISED).train()
        forwards: list[Tensor] = []
        layer.register_forward_pre_hook(lambda module, inputs, seen=forwards: seen.append(inputs[0]))
        for step in range(3):
            x = normal(60 + step, 30, 16).requires_grad_()
            y = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
            y.sum().backward()
            update(layer)
            assert predictor(layer).pooled is None  # its graph is let go
        assert len(forwards) == (6 if recomputed else 3)
        thresholds.append(predictor(layer).threshold)
    assert torch.equal(*thresholds)
    assert not torch.equal(thresholds[0], random_ffn(16, LAYOUT).router["threshold"])

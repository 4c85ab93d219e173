"""DiffMoE's router: every expert takes its share in training; thresholds decide, token by token, at inference."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from d2m_model.config import FFNLayout, Gate
from d2m_model.moe import FusedFFN, MoEFFN
from d2m_model.routers import CapacityRouter, Routing
from d2m_model.routers.capacity import CapacityPredictor
from d2m_model.routers.capacity_fit import initial_tensors
from d2m_model.routers.capacity_routing import (
    CapacityTensors,
    PoolRouting,
    predict,
    route_by_threshold,
    route_pool,
    select,
    share_of,
    updated_threshold,
)
from d2m_model.routers.token_router import BIAS, WEIGHT, pool_of

from .reference import MoE

SUM = Gate(mode="sum", scale=5.0)  # whose scale is not used, in either mode
NORMALISED = Gate(mode="normalised", scale=5.0)
LAYOUT = FFNLayout(shared=16, experts=6, width=8)
WIDTH = 5  # of predictors


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_tensors(hidden: int, experts: int, width: int, seed: int = 0) -> CapacityTensors:
    return CapacityTensors(
        in_weight_DH=normal(seed, width, hidden) * hidden**-0.5,
        in_bias_D=normal(seed + 1, width),
        out_weight_ED=normal(seed + 2, experts, width) * 2 * width**-0.5,
        out_bias_E=normal(seed + 3, experts),
        threshold_E=normal(seed + 4, experts).sigmoid(),
        scale_1=torch.tensor([3.0]),
    )


def random_ffn(hidden: int, layout: FFNLayout, seed: int = 0, *, mean: bool = True, capacity: bool = True) -> FusedFFN:
    return FusedFFN(
        up_weight_NH=normal(seed, layout.neurons, hidden) * hidden**-0.5,
        up_bias_N=normal(seed + 1, layout.neurons),
        down_weight_HN=normal(seed + 2, hidden, layout.neurons) * layout.neurons**-0.5,
        down_bias_H=normal(seed + 3, hidden),
        router={
            WEIGHT: normal(seed + 4, layout.experts, hidden) * hidden**-0.5,
            BIAS: normal(seed + 5, layout.experts),
            **(random_tensors(hidden, layout.experts, WIDTH, seed + 7).named() if capacity else {}),
        },
        expert_mean_EH=normal(seed + 6, layout.experts, hidden) * 0.1 if mean else None,
    )


def routed_by_capacity(ffn: FusedFFN, gate: Gate, layout: FFNLayout = LAYOUT, capacity: float = 2.0) -> MoEFFN:
    return MoEFFN(ffn, layout=layout, gate=gate, top_k=2, router=CapacityRouter(capacity=capacity, width=WIDTH))


def predictor(layer: MoEFFN) -> CapacityPredictor:
    assert isinstance(layer.companion, CapacityPredictor)
    return layer.companion


def pooled(layer: MoEFFN) -> PoolRouting:
    """The pool of the last forward pass in training."""
    found = predictor(layer).pooled
    assert found is not None
    return found


def update(layer: MoEFFN) -> None:
    """One training step of one microbatch on one rank."""
    predictor(layer).update(predictor(layer).take_update())


# Literally


def double(tensors: CapacityTensors) -> CapacityTensors:
    return CapacityTensors(**{f.name: getattr(tensors, f.name).double() for f in dataclasses.fields(tensors)})


def literal_prediction(x_H: Tensor, tensors: CapacityTensors) -> Tensor:
    """The predictor's probabilities for one token, float64."""
    pre_D = tensors.in_weight_DH @ x_H + tensors.in_bias_D
    return 1 / (1 + torch.exp(-(tensors.out_weight_ED @ (pre_D / (1 + torch.exp(-pre_D))) + tensors.out_bias_E)))


def literal_selection(alpha_TE: Tensor, pool: list[int], capacity: float) -> dict[int, list[int]]:
    """Return the experts that take each token."""
    experts = alpha_TE.shape[1]
    share = math.floor(len(pool) / experts * capacity + 1e-9)
    taken: dict[int, list[int]] = {t: [] for t in range(len(alpha_TE))}
    for e in range(experts):
        for t in sorted(pool, key=lambda t: (-alpha_TE[t, e].item(), t))[:share]:
            taken[t].append(e)
    return taken


class CapacityMoE(MoE):
    """Eq. 2 with DiffMoE's gates: scale * alpha of the experts that took the token (`taken`), not renormalised."""

    taken: dict[int, list[int]]
    scale: Tensor

    def gates(self, t: int, x_H: Tensor) -> dict[int, Tensor]:
        logits_E = self.router_EH @ x_H + (0 if self.router_bias_E is None else self.router_bias_E)
        alpha_E = logits_E.softmax(dim=0)
        weights = {e: self.scale * alpha_E[e] for e in self.taken[t]}
        return {
            e: weight if self.gate.mode == "normalised" else torch.ones_like(weight) for e, weight in weights.items()
        }


def literal_ffn(
    weights: list[Tensor | None], layout: FFNLayout, gate: Gate, taken: dict[int, list[int]]
) -> CapacityMoE:
    """Return a literal FFN of float64 weights in FusedFFN's order, followed by the scale of the gates."""
    *fused, scale = weights
    moe = CapacityMoE(*fused, layout, gate, top_k=0)  # type: ignore[arg-type]
    assert scale is not None
    moe.taken, moe.scale = taken, scale
    return moe


def weights_of(ffn: FusedFFN) -> list[Tensor | None]:
    dense = [ffn.up_weight_NH, ffn.up_bias_N, ffn.down_weight_HN, ffn.down_bias_H]
    weights = [*dense, ffn.router[WEIGHT], ffn.router[BIAS], ffn.expert_mean_EH, ffn.router["capacity.scale"][0]]
    return [None if tensor is None else tensor.double() for tensor in weights]


def taken_of(routing: Routing) -> dict[int, list[int]]:
    taken: dict[int, list[int]] = {t: [] for t in range(len(routing.logits_TE))}
    for t, e in zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True):
        taken[t].append(e)
    return taken


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
    capacity = data.draw(st.sampled_from([0.5, 1.0, float(experts)]) | st.floats(0.1, experts))
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


# Inference


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(max_examples=60)
@given(
    tokens=st.integers(0, 12),
    hidden=st.integers(1, 12),
    layout=st.builds(FFNLayout, shared=st.integers(0, 16), experts=st.integers(1, 8), width=st.integers(1, 16)),
    gate=st.sampled_from([SUM, NORMALISED]),
    mean=st.booleans(),
    factor=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_a_token_has_the_experts_whose_prediction_passes_their_threshold(
    tokens: int, hidden: int, layout: FFNLayout, gate: Gate, mean: bool, factor: float, seed: int
) -> None:
    ffn = random_ffn(hidden, layout, seed, mean=mean)
    layer = routed_by_capacity(ffn, gate, layout).eval()
    layer.router_value = factor
    x = normal(seed + 50, tokens, hidden)
    with torch.no_grad():
        y = layer(x)

    t_E = ffn.router["threshold"].double()
    odds_E = t_E / (1 - t_E)
    taken = {}
    for t, x_H in enumerate(x.double()):
        p_E = literal_prediction(x_H, double(CapacityTensors.of(ffn.router)))
        taken[t] = [e for e in range(layout.experts) if factor and p_E[e] / (1 - p_E[e]) > odds_E[e] / factor]
    assert taken_of(layer.route(x)) == taken
    assert predictor(layer).pooled is None
    if tokens:
        expected = literal_ffn(weights_of(ffn), layout, gate, taken)
        assert ((y.double() - expected(x.double())).abs() <= expected.rounding(x.double(), torch.float32)).all()


def routing(factor: float, tensors: CapacityTensors, x: Tensor, gate: Gate = SUM) -> Routing:
    return route_by_threshold(x, normal(1, 6, 16), None, tensors, gate=gate, factor=factor)


def test_a_larger_factor_means_more_experts_from_none_to_all_of_them() -> None:
    tensors, x = random_tensors(16, 6, 8), normal(0, 200, 16)
    found = [routing(factor, tensors, x).gates_TE > 0 for factor in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 1e30)]
    counts = [int(chosen.sum()) for chosen in found]
    assert counts == sorted(set(counts))  # at every step more
    assert (counts[0], counts[-1]) == (0, 200 * 6)
    for fewer, more in pairwise(found):
        assert not (fewer & ~more).any()


def test_thresholds_of_zero_and_one_let_every_token_and_no_token_pass() -> None:
    tensors, x = random_tensors(16, 6, 8), normal(0, 50, 16) * 1000  # sigmoids that round to 0 and 1
    tensors.threshold_E = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    for factor in (0.5, 1.0, 2.0):
        assert taken_of(routing(factor, tensors, x)) == {t: [0, 2, 4] for t in range(50)}
    assert len(routing(0.0, tensors, x).token_A) == 0


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan])
def test_a_factor_that_cannot_be_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=f"capacity factor is {factor}; expected 0"):
        routing(factor, random_tensors(16, 6, 8), normal(0, 3, 16))


def test_all_experts_at_weight_one_are_the_dense_ffn() -> None:
    ffn = random_ffn(16, LAYOUT)
    layer = routed_by_capacity(ffn, SUM).eval()
    layer.router_value = 1e30
    x = normal(50, 40, 16)
    hidden = torch.nn.functional.linear(x.double(), ffn.up_weight_NH.double(), ffn.up_bias_N.double())
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    dense = torch.nn.functional.linear(hidden, ffn.down_weight_HN.double(), ffn.down_bias_H.double())
    with torch.no_grad():
        assert (layer(x).double() - dense).norm() / dense.norm() < 5e-7


def test_a_batch_changes_no_tokens_experts() -> None:
    tensors, x = random_tensors(16, 6, 8), normal(0, 40, 16)
    together = taken_of(routing(1.0, tensors, x))
    assert together == {t: taken_of(routing(1.0, tensors, x[t : t + 1]))[0] for t in range(40)}
    assert len({len(experts) for experts in together.values()}) > 1


def test_half_precision_and_autocast_route_as_float32() -> None:
    tensors, x = random_tensors(16, 6, 8), normal(0, 40, 16).bfloat16()
    plain = routing(1.0, tensors, x.float(), NORMALISED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = routing(1.0, tensors, x, NORMALISED)
    assert taken_of(found) == taken_of(plain)
    assert torch.equal(found.gate_A, plain.gate_A)


# Initialisation and the module


def test_initial_tensors_give_every_expert_its_share_of_the_calibration_tokens_at_a_mean_gate_of_one() -> None:
    x, weight = normal(0, 120, 16), normal(1, 6, 16)
    tensors = initial_tensors(x, weight, None, capacity=2, width=8, generator=torch.Generator().manual_seed(0))
    found = route_by_threshold(x, weight, None, tensors, gate=NORMALISED)
    assert (found.gates_TE > 0).sum(dim=0).tolist() == [40] * 6
    pooled = route_pool(x, weight, None, tensors, gate=NORMALISED, capacity=2)
    torch.testing.assert_close(pooled.routing.gate_A.mean(), torch.tensor(1.0))
    everything = initial_tensors(x, weight, None, capacity=6, width=8, generator=torch.Generator().manual_seed(0))
    assert len(route_by_threshold(x, weight, None, everything, gate=SUM).token_A) == 120 * 6
    with pytest.raises(ValueError, match="There are 2 calibration tokens; expected 3 or more"):
        initial_tensors(x[:2], weight, None, capacity=2, width=8, generator=torch.Generator())


def test_the_module_gives_its_tensors_back_and_survives_a_state_dict() -> None:
    ffn = random_ffn(16, LAYOUT)
    layer, other = (routed_by_capacity(f, SUM).eval() for f in (ffn, random_ffn(16, LAYOUT, 100)))
    back = layer.fused().router
    assert back.keys() == ffn.router.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, ffn.router[name]), name
        assert tensor.data_ptr() != ffn.router[name].data_ptr()
    other.load_state_dict(layer.state_dict(), strict=True)
    x = normal(50, 30, 16)
    assert torch.equal(layer(x), other(x))
    names = {name for name in layer.state_dict() if name.startswith("capacity.")}
    assert names == {f"capacity.{part}.{kind}" for part in ("in_layer", "out_layer") for kind in ("weight", "bias")} | {
        "capacity.threshold",
        "capacity.scale",
    }


def test_a_top_k_file_has_no_capacity_router() -> None:
    layer = MoEFFN(random_ffn(16, LAYOUT, capacity=False), layout=LAYOUT, gate=SUM, top_k=2)
    assert layer.companion is None
    assert set(layer.fused().router) == {WEIGHT, BIAS}

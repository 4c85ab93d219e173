"""DiffMoE's router at inference: thresholds decide, token by token."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2m_model.config import FFNLayout, Gate
from d2m_model.experts import plan_dispatch
from d2m_model.moe import MoEFFN
from d2m_model.routers import Routing
from d2m_model.routers.capacity_fit import initial_tensors
from d2m_model.routers.capacity_routing import (
    CapacityTensors,
    listed_in_room,
    route_by_threshold,
    route_pool,
)
from d2m_model.routers.token_router import BIAS, WEIGHT

from .capacity_reference import (
    LAYOUT,
    NORMALISED,
    SUM,
    double,
    literal_ffn,
    literal_prediction,
    normal,
    predictor,
    random_ffn,
    random_tensors,
    routed_by_capacity,
    taken_of,
    weights_of,
)


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


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_pairs_listed_on_a_device_are_those_that_a_cpu_lists(tokens: int, share: float) -> None:
    """On a GPU their number is known late; in several chunks they begin where they begin on a CPU."""
    gates_TE = normal(0, tokens, 6).abs() + 1
    chosen_TE = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(1)) < share
    token_A, expert_A = chosen_TE.nonzero().unbind(1)
    expected = Routing(token_A=token_A, expert_A=expert_A, gate_A=gates_TE[token_A, expert_A], logits_TE=gates_TE)
    found = listed_in_room(chosen_TE, gates_TE, gates_TE)()
    for name in ("token_A", "expert_A", "gate_A"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    x = torch.empty(tokens, 8)
    rows = [plan_dispatch(routing, x, chunk_tokens=7).chunk_rows for routing in (found, expected)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1 + max(1, -(-tokens // 7))


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

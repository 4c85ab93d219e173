"""Eq. 3: the right experts, the right weights, the same on every device, in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_model.config import Gate
from d2m_model.routers import Routing
from d2m_model.routers.top_k import route_top_k

from .reference import chosen

SUM = Gate(mode="sum", scale=3.0)  # whose scale is not used
NORMALISED = Gate(mode="normalised", scale=3.0)


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    """Small integers: products and sums are exact in every dtype, and equal logits are common."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 12),
    hidden=st.integers(1, 6),
    experts=st.integers(1, 16),
    with_bias=st.booleans(),
    gate=st.sampled_from([SUM, NORMALISED]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_choice_and_gates_are_those_of_the_equation_with_ties_to_the_lower_index(
    tokens: int,
    hidden: int,
    experts: int,
    with_bias: bool,
    gate: Gate,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(0, experts))
    x, weight = whole_numbers(seed, tokens, hidden), whole_numbers(seed + 1, experts, hidden)
    bias = whole_numbers(seed + 2, experts) if with_bias else None
    routing = route_top_k(x.to(dtype), weight.to(dtype), bias, top_k=top_k, gate=gate)
    assert (routing.experts_TK.dtype, routing.gates_TK.dtype) == (torch.int64, torch.float32)
    assert routing.experts_TK.shape == routing.gates_TK.shape == (tokens, top_k)
    for t in range(tokens):
        logits = weight.double() @ x[t].double() + (0 if bias is None else bias.double())
        alpha = logits.softmax(dim=0)
        expected = chosen(alpha, top_k)
        assert routing.experts_TK[t].tolist() == expected
        gates = torch.ones(top_k, dtype=torch.float64) if gate is SUM else 3 * alpha[expected] / alpha[expected].sum()
        torch.testing.assert_close(routing.gates_TK[t].double(), gates, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(routing.probabilities_TE[t].double(), alpha, rtol=1e-6, atol=1e-7)


def test_a_zero_router_chooses_the_first_experts() -> None:
    routing = route_top_k(torch.randn(50, 8), torch.zeros(40, 8), None, top_k=3, gate=NORMALISED)
    assert torch.equal(routing.experts_TK, torch.arange(3).expand(50, 3))
    torch.testing.assert_close(routing.gates_TK, torch.ones(50, 3))


def test_far_apart_logits_neither_overflow_nor_tie() -> None:
    """Their float32 softmax is 1, 0, 0: the order below the first is the logits' all the same."""
    weight = torch.tensor([[-300.0], [300.0], [-200.0]])
    routing = route_top_k(torch.ones(1, 1), weight, None, top_k=3, gate=NORMALISED)
    assert routing.experts_TK.tolist() == [[1, 2, 0]]
    assert routing.gates_TK.tolist() == [[3.0, 0.0, 0.0]]


def test_logits_are_float32_for_half_precision_inputs_and_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, 64, generator=generator).bfloat16(), torch.randn(12, 64, generator=generator)
    plain = route_top_k(x, weight, None, top_k=2, gate=NORMALISED)
    torch.testing.assert_close(plain.logits_TE.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = route_top_k(x, weight, None, top_k=2, gate=NORMALISED)
    assert torch.equal(under_autocast.logits_TE, plain.logits_TE)
    assert under_autocast.gates_TK.dtype == torch.float32


def test_many_tokens_are_routed_as_few_are() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2500, 8, generator=generator), torch.randn(12, 8, generator=generator)
    whole = route_top_k(x, weight, None, top_k=2, gate=SUM)
    parts = [route_top_k(part, weight, None, top_k=2, gate=SUM) for part in x.split(700)]
    torch.testing.assert_close(whole.logits_TE, torch.cat([part.logits_TE for part in parts]))
    assert torch.equal(whole.experts_TK, torch.cat([part.experts_TK for part in parts]))


@pytest.mark.parametrize("top_k", [-1, 5])
def test_a_top_k_that_cannot_be_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}; expected 0 to 4, the number of experts"):
        route_top_k(torch.randn(2, 3), torch.randn(4, 3), None, top_k=top_k, gate=SUM)


def routing_with_gradient(gate: Gate, top_k: int) -> tuple[Routing, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator, requires_grad=True)
    return route_top_k(torch.randn(6, 3, generator=generator), weight, None, top_k=top_k, gate=gate), weight


def test_the_router_learns_through_normalised_gates_and_always_through_its_probabilities() -> None:
    routing, weight = routing_with_gradient(NORMALISED, 2)
    (gradient,) = torch.autograd.grad(routing.gates_TK[:, 0].sum(), weight)
    assert gradient.abs().max() > 1e-3
    routing, weight = routing_with_gradient(SUM, 2)
    assert not routing.gates_TK.requires_grad
    (gradient,) = torch.autograd.grad(routing.probabilities_TE[:, 0].sum(), weight)
    assert gradient.abs().max() > 1e-3

"""The seam: sorting tokens to experts, the two halves of the experts' MLPs, and the grouped product beneath."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from d2m_model import experts
from d2m_model.config import FFNLayout, Gate
from d2m_model.experts import Dispatch, expert_down, expert_up, mean_compensation, plan_dispatch
from d2m_model.kernels import grouped_mm as grouped_product
from d2m_model.kernels.grouped_mm import grouped_mm
from d2m_model.layout import expert_views
from d2m_model.routers import Routing
from d2m_model.routers.top_k import route_top_k

from .reference import MoE

SUM = Gate(mode="sum", scale=1.0)
NATIVE = {torch.float32, torch.bfloat16, torch.float16}
# Largest relative error (norms) against float64 of a product or a few, whose operands and result are rounded to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """`native`: torch's grouped_mm where it takes the operands. `loop`: the fallback, as where it is missing."""
    if name == "native":
        yield
    else:
        with mock.patch.object(grouped_product, "_native_on", return_value=False):
            yield


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def random_routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> Routing:
    """Distinct experts for every token, gates of any size; with few tokens, many experts stay empty."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    return Routing.even(
        experts_TK=logits.argsort(dim=1, descending=True)[:, :top_k],
        gates_TK=torch.rand(tokens, top_k, generator=generator) + 0.5,
        logits_TE=logits,
    )


def random_uneven_routing(tokens: int, experts: int, density: float, seed: int = 0) -> Routing:
    """Any number of experts for each token, 0 and all of them included."""
    generator = torch.Generator().manual_seed(seed)
    token_A, expert_A = (torch.rand(tokens, experts, generator=generator) < density).nonzero().unbind(1)
    return Routing(
        token_A=token_A,
        expert_A=expert_A,
        gate_A=torch.rand(len(token_A), generator=generator) + 0.5,
        logits_TE=torch.randn(tokens, experts, generator=generator),
    )


def as_uneven(routing: Routing) -> Routing:
    """The same choice, said the other way."""
    tokens, top_k = routing.experts_TK.shape
    experts_TK, order_TK = routing.experts_TK.sort(dim=1)
    return Routing(
        token_A=torch.arange(tokens).repeat_interleave(top_k),
        expert_A=experts_TK.flatten(),
        gate_A=routing.gates_TK.gather(1, order_TK).flatten(),
        logits_TE=routing.logits_TE,
    )


def random_weights(hidden: int, layout: FFNLayout, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Fused up, up bias and down, of which the experts are strided views."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(layout.neurons, hidden, generator=generator) / hidden**0.5
    bias = torch.randn(layout.neurons, generator=generator)
    down = torch.randn(hidden, layout.neurons, generator=generator) / layout.neurons**0.5
    return up.to(dtype), bias.to(dtype), down.to(dtype)


def routed(x: Tensor, plan: Dispatch, up: Tensor, bias: Tensor, down: Tensor, layout: FFNLayout) -> Tensor:
    up_EFH, bias_EF, down_HEF = expert_views(up, bias, down, layout)
    return expert_down(expert_up(x, plan, up_EFH, bias_EF), plan, down_HEF)


def exact(routing: Routing, up: Tensor, bias: Tensor, down: Tensor, layout: FFNLayout) -> MoE:
    """The reference with these choices and gates, and a shared expert that gives zero."""

    class GivenRouting(MoE):
        def gates(self, t: int, x_H: Tensor) -> dict[int, Tensor]:
            if routing.per_token is None:
                rows = routing.token_A == t
                return dict(zip(routing.expert_A[rows].tolist(), routing.gate_A[rows].double(), strict=True))
            return dict(zip(routing.experts_TK[t].tolist(), routing.gates_TK[t].double(), strict=True))

    down = down.double().clone()
    down[:, : layout.shared] = 0
    zeros = down.new_zeros(down.shape[0])
    return GivenRouting(up.double(), bias.double(), down, zeros, zeros, None, None, layout, SUM, top_k=0)


# The plan


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 30),
    n=st.integers(1, 12),
    chunk_tokens=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_the_plan_lists_every_assignment_once_sorted_by_chunk_and_expert(
    tokens: int, n: int, chunk_tokens: int | None, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(0, n))
    routing = random_routing(tokens, n, top_k, seed)
    plan = plan_dispatch(routing, torch.empty(tokens, 8), chunk_tokens)
    seen = 0
    for chunk, rows, ends in plan.chunks():
        assert rows.start == seen
        assert chunk.start * top_k == rows.start
        assert chunk_tokens is None or chunk.stop - chunk.start <= chunk_tokens
        assert ends.dtype == torch.int32
        assert ends[-1] == rows.stop - rows.start
        for expert in range(n):
            first = rows.start + (int(ends[expert - 1]) if expert else 0)
            for row in range(first, rows.start + int(ends[expert])):
                token = int(plan.token_A[row])
                choice = int(plan.slot_A[row]) - token * top_k
                assert chunk.start <= token < chunk.stop
                assert plan.expert_A[row] == expert
                assert plan.gate_A[row] == routing.gates_TK[token, choice]
                assert routing.experts_TK[token, choice] == expert
        seen = rows.stop
    assert seen == tokens * top_k
    assert plan.slot_A.sort().values.tolist() == list(range(tokens * top_k))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 30),
    n=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    chunk_tokens=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_the_plan_of_an_uneven_routing_lists_every_assignment_once_and_leads_back_from_every_token(
    tokens: int, n: int, density: float, chunk_tokens: int | None, seed: int
) -> None:
    routing = random_uneven_routing(tokens, n, density, seed)
    gates = routing.gates_TE
    plan = plan_dispatch(routing, torch.empty(tokens, 8), chunk_tokens)
    seen = []
    for chunk, rows, ends in plan.chunks():
        assert chunk_tokens is None or chunk.stop - chunk.start <= chunk_tokens
        assert ends[-1] == rows.stop - rows.start
        expert_of = torch.searchsorted(ends, torch.arange(rows.stop - rows.start), right=True)
        assert torch.equal(plan.expert_A[rows], expert_of)
        token_A, slot_A, first_T = plan.links(chunk, rows)
        assert first_T is not None
        row_A = slot_A.argsort()
        for token, (first, last) in enumerate(pairwise([*first_T.tolist(), len(row_A)])):
            mine = row_A[first:last]
            assert (token_A[mine] == token).all()
            assert plan.expert_A[rows][mine].tolist() == gates[chunk][token].nonzero().flatten().tolist()
        seen += [(int(t), int(e)) for t, e in zip(plan.token_A[rows], plan.expert_A[rows], strict=True)]
    assert sorted(seen) == list(zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True))
    assert all(gate == gates[t, e] for t, e, gate in zip(plan.token_A, plan.expert_A, plan.gate_A, strict=True))


def test_chunks_are_equal_but_for_rounding_and_as_many_as_the_memory_asks() -> None:
    plan = plan_dispatch(random_routing(4608, 12, 2), torch.empty(4608, 3072, dtype=torch.bfloat16, device="meta"))
    assert len(list(plan.chunks())) == 1  # elsewhere than on a CPU one, up to half a gibibyte
    plan = plan_dispatch(random_routing(4608, 12, 2), torch.empty(0, 3072, dtype=torch.bfloat16))
    assert [chunk.stop - chunk.start for chunk, _, _ in plan.chunks()] == [1536, 1536, 1536]


# The two halves


@settings(max_examples=40)
@given(
    implementation_name=st.sampled_from(["native", "loop"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    tokens=st.integers(1, 24),
    hidden=st.integers(1, 24),
    layout=st.builds(FFNLayout, shared=st.integers(0, 16), experts=st.integers(1, 8), width=st.integers(1, 16)),
    chunk_tokens=st.none() | st.integers(1, 8),
    density=st.none() | st.sampled_from([0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_each_token_gets_the_weighted_sum_of_its_experts_whatever_the_widths(
    implementation_name: str,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    layout: FFNLayout,
    chunk_tokens: int | None,
    density: float | None,
    seed: int,
    data: st.DataObject,
) -> None:
    """`density`: of an uneven routing; None is a top-k one."""
    routing: Routing
    if density is None:
        routing = random_routing(tokens, layout.experts, data.draw(st.integers(1, layout.experts)), seed)
    else:
        routing = random_uneven_routing(tokens, layout.experts, density, seed)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    up, bias, down = random_weights(hidden, layout, dtype, seed + 2)
    with implementation(implementation_name):
        y = routed(x, plan_dispatch(routing, x, chunk_tokens), up, bias, down, layout)
    assert y.dtype == dtype
    expected = exact(routing, up, bias, down, layout)
    error = (y.double() - expected(x.double())).abs()
    assert (error <= expected.rounding(x.double(), dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_size_changes_nothing_but_rounding_in_results_and_gradients(dtype: torch.dtype) -> None:
    layout = FFNLayout(shared=8, experts=6, width=16)
    weights = random_weights(16, layout, dtype)
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for chunk_tokens in (100, 1, 7, 64, 1000):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
        y = routed(inputs[0], plan_dispatch(random_routing(100, 6, 3), x, chunk_tokens), *inputs[1:], layout)
        y.sum().backward()
        results.append([y, *(tensor.grad for tensor in inputs)])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_a_top_k_routing_said_as_an_uneven_one_has_the_same_results_and_gradients(chunk_tokens: int | None) -> None:
    layout = FFNLayout(shared=8, experts=6, width=16)
    weights, even = random_weights(16, layout, torch.float32), random_routing(40, 6, 3)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    results = []
    for routing in (even, as_uneven(even)):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
        y = routed(inputs[0], plan_dispatch(routing, x, chunk_tokens), *inputs[1:], layout)
        y.square().sum().backward()
        results.append([y, *(tensor.grad for tensor in inputs)])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < TOLERANCE[torch.float32]
    torch.testing.assert_close(as_uneven(even).gates_TE, even.gates_TE)
    torch.testing.assert_close(as_uneven(even).probabilities_TE, even.probabilities_TE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_devices_without_bags_add_rows_to_the_same_sums(dtype: torch.dtype) -> None:
    plan = plan_dispatch(random_uneven_routing(20, 6, 0.3), torch.empty(20, 8))
    rows = torch.randn(len(plan.token_A), 8).to(dtype)
    expected = experts._sum_rows(rows, plan.token_A, plan.slot_A, plan.first_T, 20)
    assert relative_error(experts._add_rows(rows, plan.token_A, 20), expected) < TOLERANCE[dtype]


def test_experts_that_no_token_chose_take_no_part_and_get_zero_gradients() -> None:
    layout = FFNLayout(shared=0, experts=4, width=8)
    up, bias, down = (w.requires_grad_() for w in random_weights(8, layout, torch.float32))
    routing = random_routing(5, 4, 2)
    routing.expert_A = torch.tensor([1, 3]).repeat(5)
    x = torch.randn(5, 8)
    with torch.no_grad():
        for weight, axis in ((up, 0), (bias, 0), (down, 1)):
            weight.narrow(axis, 0, 8).fill_(float("nan"))
            weight.narrow(axis, 16, 8).fill_(float("nan"))
    for name in ("native", "loop"):
        up.grad = down.grad = None
        with implementation(name):
            y = routed(x, plan_dispatch(routing, x), up, bias, down, layout)
            y.sum().backward()
        assert y.isfinite().all()
        for expert, chosen in enumerate((False, True, False, True)):
            for gradient in (up.grad[8 * expert : 8 * expert + 8], down.grad[:, 8 * expert : 8 * expert + 8]):
                assert gradient.abs().max() > 0 if chosen else gradient.abs().max() == 0


@pytest.mark.parametrize(("tokens", "top_k"), [(5, 0), (0, 2), (0, 0)])
def test_nothing_routed_is_zero_and_touches_no_weight(tokens: int, top_k: int) -> None:
    layout = FFNLayout(shared=0, experts=4, width=8)
    nan = [weight.fill_(float("nan")) for weight in random_weights(8, layout, torch.bfloat16)]
    x = torch.randn(tokens, 8).bfloat16()
    for routing in (random_routing(tokens, 4, top_k), random_uneven_routing(tokens, 4, 0.0)):
        y = routed(x, plan_dispatch(routing, x), *nan, layout)
        assert torch.equal(y, torch.zeros(tokens, 8, dtype=torch.bfloat16))


def test_weights_that_nothing_was_routed_to_get_gradients_of_zero() -> None:
    """Not None: ranks that exchange gradients must all have the same ones. As of experts whose share of a pool is no token."""
    layout = FFNLayout(shared=0, experts=4, width=8)
    for routing in (random_routing(5, 4, 0), random_uneven_routing(5, 4, 0.0)):
        weights = [weight.requires_grad_() for weight in random_weights(8, layout, torch.float32)]
        inputs = [*weights, routing.gate_A.requires_grad_(), torch.randn(5, 8, requires_grad=True)]
        routed(inputs[-1], plan_dispatch(routing, inputs[-1], 2), *weights, layout).sum().backward()
        for tensor in inputs:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_gates_carry_a_gradient() -> None:
    layout = FFNLayout(shared=0, experts=4, width=8)
    weights = random_weights(8, layout, torch.float64)
    x = torch.randn(6, 8, dtype=torch.float64)
    routing = random_routing(6, 4, 2)

    def of_gates(gates: Tensor) -> Tensor:
        routing.gate_A = gates
        return routed(x, plan_dispatch(routing, x), *weights, layout)

    def of_uneven_gates(gates: Tensor) -> Tensor:
        uneven.gate_A = gates
        return routed(x, plan_dispatch(uneven, x), *weights, layout)

    uneven = random_uneven_routing(6, 4, 0.5)
    torch.autograd.gradcheck(of_gates, routing.gate_A.double().requires_grad_())
    torch.autograd.gradcheck(of_uneven_gates, uneven.gate_A.double().requires_grad_())


def test_mean_compensation_is_the_means_of_the_experts_not_chosen() -> None:
    x, weight = torch.randn(7, 8), torch.randn(5, 8)
    mean = torch.randn(5, 8)
    for gate in (SUM, Gate(mode="normalised", scale=2.0)):
        routing = route_top_k(x, weight, None, top_k=2, gate=gate)
        chosen = (routing.gates_TK[..., None] * mean[routing.experts_TK]).sum(dim=1)
        torch.testing.assert_close(mean_compensation(routing, mean, torch.float32), mean.sum(dim=0) - chosen)
    everything = route_top_k(x, weight, None, top_k=5, gate=SUM)
    assert mean_compensation(everything, mean, torch.bfloat16).abs().max() == 0


# The grouped product


@pytest.mark.parametrize("name", ["native", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ends", [[3, 3, 10, 16], [0, 0, 0, 16], [16, 16, 16, 16]])
def test_grouped_product_and_its_gradients_on_strided_views(name: str, dtype: torch.dtype, ends: list[int]) -> None:
    layout = FFNLayout(shared=16, experts=4, width=24)
    up, _, down = random_weights(32, layout, dtype)
    up_EFH, _, down_HEF = expert_views(up, torch.empty(layout.neurons), down, layout)
    generator = torch.Generator().manual_seed(3)
    for b_EDN in (up_EFH.transpose(1, 2), down_HEF.permute(1, 2, 0)):
        b = b_EDN.detach().requires_grad_()
        a = torch.randn(16, b.shape[1], generator=generator).to(dtype).requires_grad_()
        grad = torch.randn(16, b.shape[2], generator=generator).to(dtype)
        assert grouped_product._native(a.detach(), b.detach()) == (dtype in NATIVE)
        with implementation(name):
            grouped_mm(a, b, torch.tensor(ends, dtype=torch.int32)).backward(grad)
            y = grouped_mm(a, b, torch.tensor(ends, dtype=torch.int32))
        a64, b64 = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
        starts = [0, *ends[:-1]]
        y64 = torch.cat([a64[first:last] @ b64[e] for e, (first, last) in enumerate(zip(starts, ends, strict=True))])
        y64.backward(grad.double())
        for found, expected in ((y, y64), (a.grad, a64.grad), (b.grad, b64.grad)):
            assert relative_error(found, expected) < TOLERANCE[dtype] / 2


def test_an_expert_without_rows_has_no_gradient_though_a_kernel_leaves_it_unwritten() -> None:
    """This happens on Blackwell (pytorch issue 172439)."""
    torch_grouped_mm = torch._grouped_mm

    def careless(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = torch_grouped_mm(a, b, offs=offs)
        if out.dim() == 3:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    a, b = torch.randn(16, 16), torch.randn(4, 16, 8, requires_grad=True)
    with mock.patch.object(torch, "_grouped_mm", careless):
        grouped_mm(a, b, torch.tensor([0, 9, 9, 16], dtype=torch.int32)).backward(torch.ones(16, 8))
    assert b.grad is not None
    assert b.grad.isfinite().all()
    assert [bool(gradient.any()) for gradient in b.grad] == [False, True, False, True]


def test_operands_that_native_kernels_do_not_take_go_to_the_loop() -> None:
    a, b = torch.randn(8, 16), torch.randn(2, 16, 8)
    assert grouped_product._native(a, b)
    assert not grouped_product._native(a.double(), b.double())  # dtype
    assert not grouped_product._native(a[:0], b)  # no rows
    assert not grouped_product._native(a[:, :15], b[:, :, :7].contiguous())  # rows of 28 bytes
    assert not grouped_product._native(torch.randn(8, 17)[:, 1:], b)  # begins 4 bytes off
    assert not grouped_product._native(torch.randn(8, 32)[:, ::2], b)  # no stride is 1


def test_a_torch_without_grouped_mm_has_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, ends = torch.randn(16, 16), torch.randn(2, 16, 8), torch.tensor([5, 16], dtype=torch.int32)
    expected = grouped_mm(a, b, ends)
    grouped_product._native_on.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.delattr(torch, "_grouped_mm")
            torch.testing.assert_close(grouped_mm(a, b, ends), expected)
    finally:
        grouped_product._native_on.cache_clear()


def test_under_autocast_float32_weights_are_computed_in_bfloat16() -> None:
    layout = FFNLayout(shared=0, experts=4, width=16)
    up, bias, down = (weight.requires_grad_() for weight in random_weights(16, layout, torch.float32))
    x = torch.randn(20, 16)
    plan = plan_dispatch(random_routing(20, 4, 2), x)
    expected = routed(x, plan, up, bias, down, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed(x, plan, up, bias, down, layout)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]
    y.sum().backward()
    assert up.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["native", "loop"])
def test_no_weight_is_copied(name: str) -> None:
    """Every allocation of a forward pass is small beside one expert's weights."""
    layout = FFNLayout(shared=512, experts=12, width=128)
    up, bias, down = random_weights(512, layout, torch.bfloat16)
    x = torch.randn(2, 512).bfloat16()
    with implementation(name), torch.inference_mode():
        plan = plan_dispatch(random_routing(2, 12, 2), x)
        routed(x, plan, up, bias, down, layout)  # what is made once is made
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            routed(x, plan, up, bias, down, layout)
    largest = max(event.self_cpu_memory_usage for event in record.events())
    hidden_activation = 2 * 2 * 128 * 2
    assert largest >= hidden_activation, "the profiler does not see allocations: this test has lost its eyes"
    assert largest < 128 * 512 * 2 / 8

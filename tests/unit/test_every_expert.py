"""Experts in one masked product, where that is cheaper than rows sorted by expert; and the choice between the two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from d2m_model import experts
from d2m_model.config import FFNLayout
from d2m_model.experts import Dispatch, EveryExpert, expert_down, expert_up, plan_dispatch, plan_experts
from d2m_model.kernels.choice import computes_every_expert
from d2m_model.layout import expert_views
from d2m_model.routers import Routing

from .test_experts import as_uneven, exact, random_routing, random_weights, relative_error

LAYOUT = FFNLayout(shared=16, experts=5, width=24)


def gradients(run: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the result and the gradients of a loss that weighs every element differently."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    y = run(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), list(torch.autograd.grad((y * weights).sum(), leaves))


@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("uneven", [False, True])
def test_results_and_gradients_are_those_of_sorted_rows(top_k: int, uneven: bool) -> None:
    even = random_routing(40, LAYOUT.experts, top_k)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = random_weights(32, LAYOUT, torch.float64)

    def run_with(way: str) -> tuple[Tensor, list[Tensor]]:
        def run(x: Tensor, gate_A: Tensor, *weights: Tensor) -> Tensor:
            routing = as_uneven(even) if uneven else even
            routing.gate_A = gate_A
            plan = EveryExpert(gates_TE=routing.gates_TE) if way == "every" else plan_dispatch(routing, x)
            up_EFH, bias_EF, down_HEF = expert_views(*weights, LAYOUT)
            return expert_down(expert_up(x, plan, up_EFH, bias_EF), plan, down_HEF)

        gate_A = (as_uneven(even) if uneven else even).gate_A
        return gradients(run, x, gate_A, *weights)

    (y, every), (y_sorted, rows) = run_with("every"), run_with("sorted")
    assert relative_error(y, y_sorted) < 1e-6  # sorted rows are added in float32
    for found, expected in zip(every, rows, strict=True):
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
def test_results_are_those_of_the_float64_reference(dtype: torch.dtype, tolerance: float) -> None:
    routing, weights = random_routing(20, LAYOUT.experts, 2), random_weights(32, LAYOUT, dtype)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    up_EFH, bias_EF, down_HEF = expert_views(*weights, LAYOUT)
    plan = EveryExpert(gates_TE=routing.gates_TE)
    y = expert_down(expert_up(x, plan, up_EFH, bias_EF), plan, down_HEF)
    assert y.dtype == dtype
    assert relative_error(y, exact(routing, *weights, LAYOUT)(x.double())) < tolerance


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "top_k", "every"),
    [
        (64, 128, 32, 2, True),  # so few rows that starting the experts' products is the most of it
        (288, 128, 32, 4, True),  # the emoji FLUX
        (4096, 128, 32, 2, False),
        (4096, 128, 32, 8, True),  # moving rows costs more than narrow experts
        (4608, 3072, 768, 2, False),  # FLUX.1
        (512, 3072, 768, 2, False),
        (4608, 3072, 768, 12, True),  # nothing is left out
        (64, 128, 32, 0, False),
    ],
)
def test_the_cheaper_way_is_chosen_on_a_cpu(tokens: int, hidden: int, width: int, top_k: int, every: bool) -> None:
    x = torch.empty(1, hidden).expand(tokens, hidden)
    assert computes_every_expert(x, tokens * top_k, 12, width) is every
    assert not computes_every_expert(x.half(), tokens * top_k, 12, width)


def test_on_a_gpu_rows_are_sorted_unless_hardly_anything_is_left_out() -> None:
    x = torch.empty(4608, 3072, device="meta", dtype=torch.bfloat16)
    chosen = {top_k: computes_every_expert(x, 4608 * top_k, 12, 768) for top_k in (2, 8, 12)}
    assert chosen == {2: False, 8: False, 12: True}


def test_a_plan_says_which_way_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    routing, x = random_routing(20, LAYOUT.experts, 2), torch.randn(20, 32)
    assert isinstance(plan_experts(routing, x, LAYOUT.width), EveryExpert)
    monkeypatch.setattr(experts, "computes_every_expert", lambda *_: False)
    plan = plan_experts(routing, x, LAYOUT.width, chunk_tokens=10)
    assert isinstance(plan, Dispatch)
    assert plan.chunk_tokens == 10


def test_an_expert_that_a_token_did_not_choose_is_masked_exactly() -> None:
    routing = Routing.even(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), torch.zeros(6, LAYOUT.experts))
    up, bias, down = random_weights(32, LAYOUT, torch.float32)
    up[LAYOUT.shared + LAYOUT.width :] = 1e30
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    views = expert_views(up, bias, down, LAYOUT)
    plan = EveryExpert(gates_TE=routing.gates_TE)
    y = expert_down(expert_up(x, plan, *views[:2]), plan, views[2])
    assert relative_error(y, exact(routing, up, bias, down, LAYOUT)(x.double())) < 1e-6

"""Run the Triton programs in Triton's interpreter, on the CPU, and print as JSON how far each is from its reference.

A process of its own: the interpreter is chosen by TRITON_INTERPRET before Triton is imported. The reference is float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from d2m_model import experts as kernels_seam
from d2m_model.config import Gate
from d2m_model.experts import expert_down, expert_up, plan_dispatch
from d2m_model.kernels.fused import down_rows, sum_rows, up_rows
from d2m_model.kernels.routing import route_and_sort
from d2m_model.routers import top_k as router_seam
from d2m_model.routers.top_k import route_top_k

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_item(tensor: Any, scope: Any) -> None:
    """Triton 3.6's interpreter makes loop bounds of arrays with one element, which NumPy 2.4 no longer takes as numbers."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_item

SHARED = 16  # neurons ahead of the experts', so that expert weights are strided views


def relative(found: Tensor, expected: Tensor) -> float:
    """Error of `found` relative to the norm of `expected`; absolute where that is zero."""
    scale = float(expected.norm()) or 1.0
    return float((found.double() - expected).norm()) / scale


def expert_views(up_NH: Tensor, bias_N: Tensor, down_HN: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    split = (experts, -1)
    return (
        up_NH[SHARED:].unflatten(0, split),
        bias_N[SHARED:].unflatten(0, split),
        down_HN[:, SHARED:].unflatten(1, split),
    )


def expert_case(
    tokens: int, hidden: int, experts: int, width: int, chosen: Callable[[int], int], dtype: torch.dtype, uneven: bool
) -> dict[str, float]:
    """Errors of the output and of all gradients; token t goes to `chosen(t)` random experts."""
    torch.manual_seed(0)
    neurons = SHARED + experts * width
    # x is a slice of a wider tensor: its rows are not contiguous.
    x_TH = torch.randn(tokens, hidden + 8, dtype=torch.float64)[:, :hidden]
    up_NH = torch.randn(neurons, hidden, dtype=torch.float64) / hidden**0.5
    bias_N = torch.randn(neurons, dtype=torch.float64)
    down_HN = torch.randn(hidden, neurons, dtype=torch.float64) / width**0.5
    pairs = [(t, e) for t in range(tokens) for e in torch.randperm(experts)[: chosen(t)].tolist()]
    token_A = torch.tensor([t for t, _ in pairs], dtype=torch.int64)
    expert_A = torch.tensor([e for _, e in pairs], dtype=torch.int64)
    gate_A = torch.rand(len(pairs), dtype=torch.float64)
    sorted_A, order_A = expert_A.sort(stable=True)
    ends_E = torch.searchsorted(sorted_A, torch.arange(experts), right=True).to(torch.int32)
    first_T = torch.searchsorted(token_A, torch.arange(tokens)) if uneven else None

    def reference(x_TH: Tensor, up_NH: Tensor, bias_N: Tensor, down_HN: Tensor, gate_A: Tensor) -> Tensor:
        up_EFH, bias_EF, down_HEF = expert_views(up_NH, bias_N, down_HN, experts)
        before_AF = torch.einsum("ah,afh->af", x_TH[token_A], up_EFH[expert_A]) + bias_EF[expert_A]
        hidden_AF = F.gelu(before_AF, approximate="tanh") * gate_A[:, None]
        rows_AH = torch.einsum("af,ahf->ah", hidden_AF, down_HEF.transpose(0, 1)[expert_A])
        return x_TH.new_zeros(x_TH.shape).index_add(0, token_A, rows_AH)

    def fused(x_TH: Tensor, up_NH: Tensor, bias_N: Tensor, down_HN: Tensor, gate_A: Tensor, keep: bool) -> Tensor:
        up_EFH, bias_EF, down_HEF = expert_views(up_NH, bias_N, down_HN, experts)
        hidden_AF, _ = up_rows(x_TH, token_A[order_A], order_A, first_T, gate_A[order_A], ends_E, up_EFH, bias_EF, keep)
        rows_AH = down_rows(hidden_AF, order_A, ends_E, down_HEF)
        return sum_rows(rows_AH, token_A[order_A], order_A, first_T, tokens)

    names, values = ("x", "up", "bias", "down", "gate"), (x_TH, up_NH, bias_N, down_HN, gate_A)
    exact = [value.clone().requires_grad_() for value in values]
    expected_TH, grad_TH = reference(*exact), torch.randn(tokens, hidden, dtype=torch.float64)
    expected_TH.backward(grad_TH)
    low = [
        value.detach().to(torch.float32 if name == "gate" else dtype) for name, value in zip(names, values, strict=True)
    ]
    leaves = [value.requires_grad_() for value in low]
    found_TH = fused(*leaves, keep=True)
    found_TH.backward(grad_TH.to(dtype))
    with torch.no_grad():
        without_gradients_TH = fused(*leaves, keep=False)
    errors = {f"gradient of {name}": relative(b.grad, a.grad) for name, a, b in zip(names, exact, leaves, strict=True)}
    errors["output"] = relative(found_TH.detach(), expected_TH.detach())
    return errors | {"output without gradients": relative(without_gradients_TH, expected_TH.detach())}


def float8_case(dtype: torch.dtype) -> dict[str, float]:
    """Errors against weights that were converted before, with every finite float8 number among them."""
    torch.manual_seed(3)
    experts, hidden, width, tokens = 3, 40, 24, 37
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()]

    def weight(*shape: int) -> Tensor:
        drawn = numbers[torch.randint(len(numbers), (shape[0] * shape[1] * shape[2],))]
        drawn[: len(numbers)] = numbers[: len(drawn)]
        return drawn.view(shape).to(dtype)

    up_EFH, down_HEF = weight(experts, width, hidden), weight(hidden, experts, width)
    scales = [1 / float(up_EFH.float().norm()), 1 / float(down_HEF.float().norm())]
    x_TH, bias_EF = torch.randn(tokens, hidden), torch.randn(experts, width)
    routing = route_top_k(x_TH, torch.randn(experts, hidden), None, top_k=2, gate=Gate(mode="normalised", scale=2.0))
    with mock.patch.object(kernels_seam, "has_kernels", return_value=True):
        plan = plan_dispatch(routing, x_TH)
    up_scale, down_scale = (torch.tensor(scale) for scale in scales)
    found_AF = expert_up(x_TH, plan, up_EFH, bias_EF, up_scale)
    expected_AF = expert_up(x_TH, plan, up_EFH.float() * up_scale, bias_EF)
    found_TH = expert_down(expected_AF, plan, down_HEF, down_scale)
    expected_TH = expert_down(expected_AF, plan, down_HEF.float() * down_scale)
    one = torch.ones(())  # scales weights that are merely stored in float8
    same_up = torch.equal(expert_up(x_TH, plan, up_EFH, bias_EF, one), expert_up(x_TH, plan, up_EFH.float(), bias_EF))
    same_down = torch.equal(
        expert_down(expected_AF, plan, down_HEF, one), expert_down(expected_AF, plan, down_HEF.float())
    )
    return {
        "up": relative(found_AF, expected_AF.double()),
        "down": relative(found_TH, expected_TH.double()),
        "merely stored": float(not (same_up and same_down)),
    }


def routing_case(tokens: int, experts: int, top_k: int, mode: str, *, ties: bool, masked: bool) -> dict[str, float]:
    """Differences between the router with kernels and without; what is chosen and where it stands must be the same."""
    torch.manual_seed(1)
    x_TH, weight_EH, bias_E = torch.randn(tokens, 80), torch.randn(experts, 80), torch.randn(experts)
    if ties:
        x_TH, weight_EH, bias_E = x_TH.round(), torch.zeros(experts, 80), torch.zeros(experts)
        weight_EH[:, 0] = 1
    gate = Gate(mode=mode, scale=2.0)  # type: ignore[arg-type]
    routings, plans = [], []
    for fused in (False, True):
        with (
            mock.patch.object(router_seam, "has_kernels", return_value=fused),
            mock.patch.object(kernels_seam, "has_kernels", return_value=fused),
        ):
            routing = route_top_k(x_TH, weight_EH, bias_E, top_k=top_k, gate=gate)
            if masked:
                routing = routing.weighed(torch.linspace(0, 1, experts))
            routings.append(routing)
            plans.append(plan_dispatch(routing, x_TH, chunk_tokens=max(1, tokens)))
    (expected, found), (expected_plan, found_plan) = routings, plans
    assert (expected.rows is None, found.rows is None) == (True, False)
    return {
        "experts": float((found.experts_TK != expected.experts_TK).sum()),
        "tokens": float((found_plan.token_A != expected_plan.token_A).sum()),
        "slots": float((found_plan.slot_A != expected_plan.slot_A).sum()),
        "ends": float((found_plan.ends_CE != expected_plan.ends_CE).sum()),
        "sorted gates": relative(found_plan.gate_A, expected_plan.gate_A.double()),
        "gates": relative(found.gates_TK, expected.gates_TK.double()),
        "logits": relative(found.logits_TE, expected.logits_TE.double()),
    }


def nan_case() -> dict[str, float]:
    """A token that is no number still gets as many experts as the others, all of them different, and spoils no other."""
    x_TH, weight_EH = torch.randn(5, 80), torch.randn(12, 80)
    x_TH[2] = float("nan")
    found = route_and_sort(x_TH, weight_EH, None, top_k=3, normalised=True, scale=1.0)
    others = [0, 1, 3, 4]
    expected = route_top_k(x_TH[others], weight_EH, None, top_k=3, gate=Gate(mode="normalised", scale=1.0))
    return {
        "choice of the token": float(found.experts_TK[2].unique().numel() != 3),
        "choice of the others": float((found.experts_TK[others] != expected.experts_TK).sum()),
        "rows": float(found.ends_E[-1] != 15),
    }


def seam_case(chunk_tokens: int) -> dict[str, float]:
    """Errors of routed experts through experts.py, which takes the kernels for tensors on the CPU here."""
    torch.manual_seed(2)
    experts, hidden, width, tokens = 3, 40, 24, 37
    routing = route_top_k(
        torch.randn(tokens, hidden),
        torch.randn(experts, hidden),
        None,
        top_k=2,
        gate=Gate(mode="normalised", scale=2.0),
    )
    values = [torch.randn(tokens, hidden), torch.randn(experts, width, hidden), torch.randn(experts, width)]
    values.append(torch.randn(hidden, experts, width))
    found: list[Tensor] = []
    for fused in (False, True):
        leaves = [value.clone().requires_grad_() for value in values]
        with mock.patch.object(kernels_seam, "has_kernels", return_value=fused):
            plan = plan_dispatch(routing, leaves[0], chunk_tokens=chunk_tokens)
        assert plan.fused is fused
        y_TH = expert_down(expert_up(leaves[0], plan, leaves[1], leaves[2]), plan, leaves[3])
        y_TH.square().sum().backward()
        found += [y_TH.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    half = len(found) // 2
    assert half == 5
    names = ("output", "gradient of x", "gradient of up", "gradient of bias", "gradient of down")
    return {name: relative(b, a.double()) for name, a, b in zip(names, found[:half], found[half:], strict=True)}


def cases() -> Iterator[tuple[str, dict[str, float]]]:
    single, half = torch.float32, torch.float16
    yield "two experts", expert_case(37, 40, 5, 24, lambda t: 2, single, uneven=False)
    yield "all experts, several tiles", expert_case(70, 136, 2, 72, lambda t: 2, single, uneven=False)
    yield "none to three experts", expert_case(37, 40, 5, 24, lambda t: t % 4, single, uneven=True)
    yield "one crowded expert", expert_case(130, 40, 1, 24, lambda t: 1, single, uneven=False)
    yield "no experts", expert_case(20, 40, 5, 24, lambda t: 0, single, uneven=False)
    yield "half precision", expert_case(20, 40, 3, 24, lambda t: 2, half, uneven=False)
    yield "through experts.py", seam_case(100)
    yield "through experts.py, in chunks", seam_case(20)
    yield "e4m3", float8_case(torch.float8_e4m3fn)
    yield "e5m2", float8_case(torch.float8_e5m2)
    yield "route: two, sum", routing_case(70, 12, 2, "sum", ties=False, masked=False)
    yield "route: all, normalised", routing_case(40, 12, 12, "normalised", ties=False, masked=True)
    yield "route: three with ties", routing_case(33, 5, 3, "normalised", ties=True, masked=False)
    yield "route: none", routing_case(10, 12, 0, "sum", ties=False, masked=False)
    yield "route: not a number", nan_case()
    yield "route: no tokens", routing_case(0, 12, 2, "sum", ties=False, masked=False)


if __name__ == "__main__":
    print(json.dumps(dict(cases())))

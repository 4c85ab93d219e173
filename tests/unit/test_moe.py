"""The MoE FFN against Eq. 1-3: results and gradients, any shape, any dtype, any k; and traced whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from d2m_model import experts
from d2m_model.config import FFNLayout, Gate
from d2m_model.kernels import grouped_mm as grouped_product
from d2m_model.kernels.choice import computes_every_expert
from d2m_model.moe import FusedFFN, MoEFFN, moe_ffn
from d2m_model.routers.token_router import BIAS, WEIGHT
from d2m_model.routers.top_k import route_top_k

from .reference import MoE

SUM = Gate(mode="sum", scale=1.0)
NORMALISED = Gate(mode="normalised", scale=2.0)
LAYOUT = FFNLayout(shared=16, experts=6, width=8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest relative error (norms) of a gradient against float64's.
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


WAYS = ("every expert", "torch's product", "loop")


@contextmanager
def computed(way: str) -> Iterator[None]:
    """The ways to compute the experts: all of them at once, or rows sorted by expert, in torch's product or in a loop."""
    native = grouped_product._native_on if way == "torch's product" else lambda device, dtype: False
    every = computes_every_expert if way == "every expert" else lambda *_: False
    with (
        mock.patch.object(grouped_product, "_native_on", native),
        mock.patch.object(experts, "computes_every_expert", every),
    ):
        yield


def random_ffn(
    hidden: int, layout: FFNLayout, dtype: torch.dtype, seed: int, *, bias: bool = True, mean: bool = True
) -> FusedFFN:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    return FusedFFN(
        up_weight_NH=normal(layout.neurons, hidden, scale=hidden**-0.5),
        up_bias_N=normal(layout.neurons),
        down_weight_HN=normal(hidden, layout.neurons, scale=layout.neurons**-0.5),
        down_bias_H=normal(hidden),
        router={
            WEIGHT: normal(layout.experts, hidden, scale=hidden**-0.5),
            **({BIAS: normal(layout.experts)} if bias else {}),
        },
        expert_mean_EH=normal(layout.experts, hidden, scale=0.1) if mean else None,
    )


def tensors(ffn: FusedFFN) -> list[Tensor | None]:
    """Return the arguments of moe_ffn."""
    dense = [ffn.up_weight_NH, ffn.up_bias_N, ffn.down_weight_HN, ffn.down_bias_H]
    return [*dense, ffn.router[WEIGHT], ffn.router.get(BIAS), ffn.expert_mean_EH]


def leaves(*values: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Copies that collect gradients."""
    return [None if value is None else value.detach().to(dtype, copy=True).requires_grad_() for value in values]


def random_x(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(ffn: list[Tensor | None], layout: FFNLayout, gate: Gate, top_k: int, x: Tensor) -> MoE:
    """The reference, with the choices of float32 logits: float64 would decide a near tie otherwise."""
    float64 = [None if tensor is None else tensor.double() for tensor in ffn]
    router, bias = ffn[4], ffn[5]
    choices = route_top_k(x.detach(), router.detach(), bias, top_k=top_k, gate=gate).experts_TK.tolist()
    return MoE(*float64, layout, gate, top_k, choices)


# Results


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 12),
    hidden=st.integers(1, 20),
    layout=st.builds(FFNLayout, shared=st.integers(0, 16), experts=st.integers(1, 8), width=st.integers(1, 16)),
    gate=st.sampled_from([SUM, NORMALISED]),
    bias=st.booleans(),
    mean=st.booleans(),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_result_is_the_equations(
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    layout: FFNLayout,
    gate: Gate,
    bias: bool,
    mean: bool,
    way: str,
    seed: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(0, layout.experts))
    ffn = tensors(random_ffn(hidden, layout, dtype, seed, bias=bias, mean=mean))
    x = random_x(tokens, hidden, dtype=dtype, seed=seed + 1)
    with computed(way):
        y = moe_ffn(x, *ffn, layout=layout, gate=gate, top_k=top_k)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    expected = exact(ffn, layout, gate, top_k, x)
    assert ((y.double() - expected(x.double())).abs() <= expected.rounding(x.double(), dtype)).all()


@settings(max_examples=20)
@given(gate=st.sampled_from([SUM, NORMALISED]), top_k=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_tied_experts_are_the_same_ones_everywhere(gate: Gate, top_k: int, seed: int) -> None:
    ffn = random_ffn(8, LAYOUT, torch.float32, seed, bias=False)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (10, 8), generator=generator).float()
    ffn.router = {WEIGHT: torch.randint(-1, 2, (6, 8), generator=generator).float()}
    y = moe_ffn(x, *tensors(ffn), layout=LAYOUT, gate=gate, top_k=top_k)
    expected = exact(tensors(ffn), LAYOUT, gate, top_k, x)
    expected.choices = None  # the reference's own, exact for whole numbers
    assert ((y.double() - expected(x.double())).abs() <= expected.rounding(x.double(), torch.float32)).all()


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_experts_at_weight_one_are_the_dense_ffn(dtype: torch.dtype, mean: bool) -> None:
    ffn = random_ffn(16, LAYOUT, dtype, 0, mean=mean)
    x = random_x(50, 16, dtype=dtype)
    y = moe_ffn(x, *tensors(ffn), layout=LAYOUT, gate=SUM, top_k=LAYOUT.experts)
    up, up_bias, down, down_bias = (tensor.double() for tensor in tensors(ffn)[:4] if tensor is not None)
    dense = F.linear(F.gelu(F.linear(x.double(), up, up_bias), approximate="tanh"), down, down_bias)
    assert (y.double() - dense).norm() / dense.norm() < {torch.float32: 5e-7}.get(dtype, torch.finfo(dtype).eps)


@pytest.mark.parametrize("gate", [SUM, NORMALISED])
def test_no_expert_at_all_is_the_shared_expert_and_the_means(gate: Gate) -> None:
    ffn = random_ffn(16, LAYOUT, torch.float32, 0)
    ffn.up_weight_NH[16:] = float("nan")
    x = random_x(5, 16, dtype=torch.float32)
    y = moe_ffn(x, *tensors(ffn), layout=LAYOUT, gate=gate, top_k=0)
    hidden = F.gelu(F.linear(x, ffn.up_weight_NH[:16], ffn.up_bias_N[:16]), approximate="tanh")
    shared = F.linear(hidden, ffn.down_weight_HN[:, :16], ffn.down_bias_H)
    assert ffn.expert_mean_EH is not None
    torch.testing.assert_close(y, shared + ffn.expert_mean_EH.sum(dim=0))


def test_leading_dimensions_are_kept_and_samples_do_not_mix() -> None:
    ffn = tensors(random_ffn(16, LAYOUT, torch.float32, 0))
    x = random_x(2, 3, 5, 16, dtype=torch.float32).transpose(0, 1)  # not contiguous
    y = moe_ffn(x, *ffn, layout=LAYOUT, gate=NORMALISED, top_k=2)
    assert y.shape == (3, 2, 5, 16)
    for i in range(3):
        torch.testing.assert_close(y[i], moe_ffn(x[i], *ffn, layout=LAYOUT, gate=NORMALISED, top_k=2))
    assert moe_ffn(x[:, :, :0], *ffn, layout=LAYOUT, gate=SUM, top_k=2).shape == (3, 2, 0, 16)


def test_top_k_beyond_the_experts_is_refused() -> None:
    ffn = tensors(random_ffn(16, LAYOUT, torch.float32, 0))
    with pytest.raises(ValueError, match="top_k is 7; expected 0 to 6"):
        moe_ffn(torch.randn(2, 16), *ffn, layout=LAYOUT, gate=SUM, top_k=7)


# Gradients


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", [SUM, NORMALISED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k"), [(23, 2), (23, 6), (1, 2), (23, 0)])
def test_gradients_are_the_equations(dtype: torch.dtype, gate: Gate, tokens: int, top_k: int, way: str) -> None:
    inputs = leaves(random_x(tokens, 16, dtype=dtype), *tensors(random_ffn(16, LAYOUT, dtype, 0)))
    inputs64 = leaves(*inputs, dtype=torch.float64)
    with computed(way):
        y = moe_ffn(*inputs, layout=LAYOUT, gate=gate, top_k=top_k)
        direction = random_x(tokens, 16, dtype=dtype, seed=1)
        y.backward(direction)
    x = inputs[0]
    assert x is not None
    expected = exact(inputs[1:], LAYOUT, gate, top_k, x)
    expected = MoE(*inputs64[1:], LAYOUT, gate, top_k, expected.choices)
    expected(inputs64[0]).backward(direction.double())
    names = ("x", "up", "up bias", "down", "down bias", "router", "router bias", "mean")
    for name, found, exactly in zip(names, inputs, inputs64, strict=True):
        assert found is not None
        assert exactly is not None
        if exactly.grad is None:  # the router, where every gate is 1 or there is none
            assert name.startswith("router")
            assert found.grad is None or found.grad.abs().max() == 0
            continue
        assert found.grad is not None, name
        error = (found.grad.double() - exactly.grad).norm() / exactly.grad.norm().clamp(min=1e-30)
        assert error < GRADIENT_TOLERANCE[dtype], name


# Traces


def traced(ffn: FusedFFN, top_k: int = 2) -> Any:
    values = tensors(ffn)
    return lambda x: moe_ffn(x, *values, layout=LAYOUT, gate=NORMALISED, top_k=top_k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_traces_with_fake_tensors_forward_and_backward_so_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        inputs = leaves(random_x(2, 40, 16, dtype=dtype), *tensors(random_ffn(16, LAYOUT, dtype, 0)))
        y = moe_ffn(*inputs, layout=LAYOUT, gate=NORMALISED, top_k=2)
        assert (y.shape, y.dtype) == ((2, 40, 16), dtype)
        y.sum().backward()
        assert all(tensor is not None and tensor.grad is not None for tensor in inputs)
        assert all(tensor.grad.shape == tensor.shape for tensor in inputs)


def test_compiles_to_one_graph_that_holds_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    eager = traced(random_ffn(16, LAYOUT, torch.float32, 0))
    compiled = torch.compile(eager, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (37, 50, 34):
        x = random_x(2, tokens, 16, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), eager(x))
    assert backend.frame_count == 1


def test_compiles_in_chunks() -> None:
    torch._dynamo.reset()
    eager = traced(random_ffn(16, LAYOUT, torch.float32, 0))
    x = random_x(80, 16, dtype=torch.float32)
    expected = eager(x)
    with mock.patch.object(experts, "CHUNK_BYTES_CPU", 30 * 2 * 16 * 4):  # 30 tokens: three chunks
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x), expected)


def test_compiled_gradients_are_the_eager_ones() -> None:
    torch._dynamo.reset()
    layer = module(random_ffn(16, LAYOUT, torch.float32, 0))
    x = random_x(20, 16, dtype=torch.float32)
    layer(x).square().sum().backward()
    eager = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name])


# Module


def module(ffn: FusedFFN, top_k: int = 2) -> MoEFFN:
    return MoEFFN(ffn, layout=LAYOUT, gate=NORMALISED, top_k=top_k)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("shared", [16, 0])
def test_module_computes_what_the_fused_weights_do_and_gives_them_back(optional: bool, shared: int) -> None:
    layout = FFNLayout(shared=shared, experts=6, width=8)
    ffn = random_ffn(16, layout, torch.bfloat16, 0, bias=optional, mean=optional)
    layer = MoEFFN(ffn, layout=layout, gate=NORMALISED, top_k=2)
    x = random_x(2, 9, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), moe_ffn(x, *tensors(ffn), layout=layout, gate=NORMALISED, top_k=2))
    for before, after in zip(tensors(ffn), tensors(layer.fused()), strict=True):
        assert (before is None) == (after is None)
        assert before is None or (after is not None and torch.equal(before, after))


def test_module_owns_its_weights_and_can_train_the_experts_alone() -> None:
    ffn = random_ffn(16, LAYOUT, torch.float32, 0)
    layer = module(ffn)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith(("routed", "router", "expert_mean")))
    optimizer = torch.optim.SGD([parameter for parameter in layer.parameters() if parameter.requires_grad], lr=0.1)
    before = [None if tensor is None else tensor.clone() for tensor in tensors(ffn)]
    layer(random_x(20, 16, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    trained = layer.fused()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(ffn), strict=True) if a is not None and b is not None)
    assert torch.equal(trained.up_weight_NH[:16], ffn.up_weight_NH[:16])
    assert torch.equal(trained.down_weight_HN[:, :16], ffn.down_weight_HN[:, :16])
    assert not torch.equal(trained.up_weight_NH[16:], ffn.up_weight_NH[16:])
    assert not torch.equal(trained.down_weight_HN[:, 16:], ffn.down_weight_HN[:, 16:])
    assert not torch.equal(trained.router[WEIGHT], ffn.router[WEIGHT])


def test_module_survives_a_state_dict() -> None:
    layer, other = (module(random_ffn(16, LAYOUT, torch.float32, seed)) for seed in (0, 1))
    other.load_state_dict(layer.state_dict(), strict=True)
    x = random_x(9, 16, dtype=torch.float32)
    assert torch.equal(layer(x), other(x))

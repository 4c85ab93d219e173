"""Mixture of Blocks: the right blocks for every sample, run on it alone; gradients of the straight-through form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from d2m_model.config import Selection
from d2m_model.mob import (
    BLOCK_RIDGES,
    BlockRouting,
    SampleSubset,
    block_balance_loss,
    block_choice_loss,
    choice_fractions,
    masked,
    mean_tokens,
    random_block_routers,
    ridge_block_routers,
    route_blocks,
    samples_per_block,
    scatter_rows,
    select_rows,
)

SELECTIONS: list[Selection] = ["topk", "window"]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole_numbers(seed: int, *shape: int) -> Tensor:
    """Even ones, so that half of them is exact too; equal logits are common."""
    return 2 * torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def literal_choice(logits_M: list[float], active: int, selection: Selection) -> set[int]:
    """Eq. 5 and Eq. 4 of one sample, from its logits."""
    blocks = len(logits_M)
    if selection == "topk":
        return set(sorted(range(blocks), key=lambda i: (-logits_M[i], i))[:active])
    first = min(range(blocks - active + 1), key=lambda q: (-sum(logits_M[q : q + active]), q))
    return set(range(first, first + active))


def run_on(
    samples: SampleSubset, block: Callable[..., tuple[Tensor, ...]], streams: tuple[Tensor, ...], **conditions: Any
) -> tuple[Tensor, ...]:
    """Run a block on `samples` alone, as the hosts do."""
    if samples.count == 0:
        return streams
    outputs = block(*select_rows(streams, samples), **select_rows(conditions, samples))
    return tuple(scatter_rows(stream, new, samples) for stream, new in zip(streams, outputs, strict=True))


def chosen(routing: BlockRouting) -> list[set[int]]:
    return [{i for i, runs in enumerate(row) if runs} for row in routing.chosen_BM.tolist()]


# Routing


@settings(max_examples=80)
@given(
    batch=st.integers(1, 5),
    hidden=st.integers(1, 6),
    blocks=st.integers(2, 7),
    selection=st.sampled_from(SELECTIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_every_sample_gets_the_blocks_of_the_equation_with_ties_to_the_lower_index(
    batch: int,
    hidden: int,
    blocks: int,
    selection: Selection,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    active = data.draw(st.integers(0, blocks))
    x, vec = whole_numbers(seed, batch, hidden), whole_numbers(seed + 1, batch, hidden)
    router_x, router_y = whole_numbers(seed + 2, blocks, hidden), whole_numbers(seed + 3, blocks, hidden)
    routing = route_blocks(x, vec.to(dtype), router_x.to(dtype), router_y.to(dtype), active, selection)
    logits = 0.5 * x.double() @ router_x.double().T + (1 - 0.5) * vec.double() @ router_y.double().T
    assert routing.logits_BM.dtype == torch.float32
    assert torch.equal(routing.logits_BM.double(), logits)
    assert chosen(routing) == [literal_choice(row, active, selection) for row in logits.tolist()]
    torch.testing.assert_close(routing.probabilities_BM.double(), logits.softmax(dim=1), rtol=1e-6, atol=1e-7)


def test_a_window_is_consecutive_where_the_best_blocks_are_not() -> None:
    logits = torch.tensor([[3.0, 0.0, 0.0, 2.0, 2.0]])
    routers = 2 * logits.T  # of a feature that is 1; W_y sees a 0
    for selection, expected in (("topk", {0, 3}), ("window", {3, 4})):
        assert chosen(route_blocks(torch.ones(1, 1), torch.zeros(1, 1), routers, routers, 2, selection)) == [expected]


@pytest.mark.parametrize("active", [-1, 4])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_more_blocks_than_there_are_cannot_be_active(active: int, selection: Selection) -> None:
    with pytest.raises(ValueError, match=f"{active} active blocks; expected 0 to 3"):
        route_blocks(torch.ones(1, 2), torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 2), active, selection)


def test_mean_is_over_all_tokens_alike_and_in_float32() -> None:
    image, text = normal(0, 2, 300, 8, dtype=torch.bfloat16) + 100, normal(1, 2, 7, 8, dtype=torch.bfloat16)
    joint = torch.cat([text, image], dim=1)
    found = mean_tokens(image, text)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), joint.double().mean(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean_tokens(joint), found, rtol=1e-6, atol=0)


def test_samples_of_a_batch_choose_for_themselves() -> None:
    x, vec, router_x, router_y = normal(0, 6, 8), normal(1, 6, 8), normal(2, 5, 8), normal(3, 5, 8)
    together = chosen(route_blocks(x, vec, router_x, router_y, 2, "topk"))
    alone = [chosen(route_blocks(x[b : b + 1], vec[b : b + 1], router_x, router_y, 2, "topk"))[0] for b in range(6)]
    assert together == alone
    assert len({frozenset(blocks) for blocks in together}) > 1


# Inference


def block(index: int) -> Any:
    """A block of two streams that writes into its inputs, as FLUX's do, and reads everything that it is given."""

    def run(img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        context = torch.cat([txt, img], dim=1).mean(dim=1, keepdim=True) * (index + 1)
        img += torch.tanh(context + vec[:, None] + pe)
        txt += torch.sin(context * vec[:, None] + index)
        if mask is not None:
            img += mask.sum(dim=1, keepdim=True)[..., None]
        return img, txt

    return run


@settings(max_examples=50)
@given(
    batch=st.integers(1, 5),
    blocks=st.integers(2, 4),
    selection=st.sampled_from(SELECTIONS),
    pe_shared=st.booleans(),
    with_mask=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_batch_runs_as_its_samples_do_one_by_one(
    batch: int, blocks: int, selection: Selection, pe_shared: bool, with_mask: bool, seed: int, data: st.DataObject
) -> None:
    active = data.draw(st.integers(0, blocks))
    streams = (normal(seed, batch, 6, 4), normal(seed + 1, batch, 3, 4))
    vec, pe = normal(seed + 2, batch, 4), normal(seed + 3, 1 if pe_shared else batch, 6, 4)
    mask = normal(seed + 4, batch, 6) if with_mask else None
    routers = normal(seed + 5, blocks, 4), normal(seed + 6, blocks, 4)

    routing = route_blocks(mean_tokens(*streams), vec, *routers, active, selection)
    found = tuple(stream.clone() for stream in streams)
    for index, samples in enumerate(samples_per_block(routing)):
        found = run_on(samples, block(index), found, vec=vec, pe=pe, mask=mask)

    for b in range(batch):
        one = tuple(stream[b : b + 1].clone() for stream in streams)
        for index in sorted(chosen(routing)[b]):
            at = {"vec": vec[b : b + 1], "pe": pe if pe_shared else pe[b : b + 1]}
            one = block(index)(*one, **at, mask=None if mask is None else mask[b : b + 1])
        for stream, expected in zip(found, one, strict=True):
            torch.testing.assert_close(stream[b : b + 1], expected)


def routing_of(rows: list[list[int]], active: int = 1) -> BlockRouting:
    chosen_BM = torch.tensor(rows).bool()
    return BlockRouting(chosen_BM=chosen_BM, logits_BM=torch.zeros(chosen_BM.shape), active=active)


def test_a_block_sees_only_the_samples_that_chose_it_and_nothing_is_copied_for_all_of_them() -> None:
    seen = []

    def look(x: Tensor, vec: Tensor) -> tuple[Tensor]:
        seen.append((x, vec))
        return (x + 1,)

    x, vec = normal(0, 3, 2, 4), normal(1, 3, 4)
    out = (x,)
    for samples in samples_per_block(routing_of([[0, 1, 0], [1, 1, 0], [0, 1, 0]], active=2)):
        out = run_on(samples, look, out, vec=vec)
    assert [len(called) for called, _ in seen] == [1, 3]
    assert torch.equal(seen[0][1], vec[1:2])
    assert seen[1][1] is vec
    assert torch.equal(out[0], x + torch.tensor([1.0, 2.0, 1.0])[:, None, None])
    unchanged = run_on(SampleSubset(batch=3, count=0, index_S=None), look, (x,), vec=vec)
    assert unchanged[0] is x
    assert len(seen) == 2


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_what_belongs_to_samples_is_taken_and_what_they_share_is_left() -> None:
    (samples, _) = samples_per_block(routing_of([[1, 0], [0, 1], [1, 0]]))
    per_sample, shared, square = normal(0, 3, 2), normal(1, 1, 2), normal(2, 7, 7)
    given = {"vec": Pair(per_sample, shared), "mask": square, "list": [per_sample, None], "options": "untouched"}
    found = select_rows(given, samples)
    assert isinstance(found["vec"], Pair)
    for taken in (found["vec"].first, found["list"][0]):
        assert torch.equal(taken, per_sample[[0, 2]])
    assert found["vec"].second is shared
    assert found["mask"] is square
    assert (found["list"][1], found["options"]) == (None, "untouched")


def test_the_host_waits_for_the_device_only_where_a_block_may_be_left_out() -> None:
    with FakeTensorMode():
        for active in (0, 3):
            routing = route_blocks(
                torch.ones(2, 4), torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, 4), active, "topk"
            )
            assert [samples.count for samples in samples_per_block(routing)] == [2 if active else 0] * 3
        routing = route_blocks(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, 4), 2, "topk")
        masked(routing, 0, [torch.ones(2, 5, 4)], [torch.ones(2, 5, 4)])
        with pytest.raises(DataDependentOutputException):
            samples_per_block(routing)


def test_running_every_block_and_masking_compiles_to_one_graph() -> None:
    streams, vec, pe = (normal(0, 3, 6, 4), normal(1, 3, 2, 4)), normal(2, 3, 4), normal(3, 1, 6, 4)
    routers = normal(4, 3, 4), normal(5, 3, 4)

    def group(img: Tensor, txt: Tensor) -> tuple[Tensor, ...]:
        routing = route_blocks(mean_tokens(img, txt), vec, *routers, 1, "topk")
        out: tuple[Tensor, ...] = (img, txt)
        for index in range(3):
            found = block(index)(*(stream.clone() for stream in out), vec=vec, pe=pe, mask=None)
            out = masked(routing, index, out, found)
        return out

    expected = streams
    for index, samples in enumerate(samples_per_block(route_blocks(mean_tokens(*streams), vec, *routers, 1, "topk"))):
        copies = tuple(stream.clone() for stream in expected)
        expected = run_on(samples, block(index), copies, vec=vec, pe=pe, mask=None)
    compiled = torch.compile(group, fullgraph=True, backend="eager")(*streams)
    for found, right in zip(compiled, expected, strict=True):
        torch.testing.assert_close(found, right)


# Training


def literal_group(x_BTH: Tensor, vec_BH: Tensor, w: dict[str, Tensor], active: int) -> Tensor:
    """Eq. 5 and y = x + (1 + p - sg(p)) (B(x) - x), sample by sample. B(x) = x + tanh(x W_m) here."""
    out = []
    for x_TH, vec_H in zip(x_BTH, vec_BH, strict=True):
        logits_M = 0.5 * w["x"] @ x_TH.mean(dim=0) + 0.5 * w["y"] @ vec_H
        p_M = logits_M.softmax(dim=0)
        for index in sorted(literal_choice(logits_M.tolist(), active, "topk")):
            x_TH = x_TH + (1 + p_M[index] - p_M[index].detach()) * torch.tanh(x_TH @ w["blocks"][index])
        out.append(x_TH)
    return torch.stack(out)


def masked_group(x_BTH: Tensor, vec_BH: Tensor, w: dict[str, Tensor], active: int) -> Tensor:
    routing = route_blocks(mean_tokens(x_BTH), vec_BH, w["x"], w["y"], active, "topk")
    for index, weight in enumerate(w["blocks"]):
        (x_BTH,) = masked(routing, index, [x_BTH], [x_BTH + torch.tanh(x_BTH @ weight)])
    return x_BTH


@pytest.mark.parametrize("active", [0, 1, 2, 3])
def test_gradients_are_those_of_the_straight_through_form(active: int) -> None:
    """Gradients of the tokens, the AdaLN vector, the blocks and both routers. Routing is in float32, hence the tolerance."""
    values = {"x": normal(0, 3, 8), "y": normal(1, 3, 8), "blocks": normal(2, 3, 8, 8) / 3}
    inputs = {"tokens": normal(3, 4, 5, 8), "vec": normal(4, 4, 8), **values}
    found = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    exact = {name: value.double().requires_grad_() for name, value in inputs.items()}
    y = masked_group(found["tokens"], found["vec"], found, active)
    expected = literal_group(exact["tokens"], exact["vec"], exact, active)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    direction = normal(5, 4, 5, 8)
    y.backward(direction)
    expected.backward(direction.double())
    for name, value in exact.items():
        gradient = found[name].grad
        if value.grad is None:  # no block is active: nothing but the tokens is read
            assert active == 0
            assert gradient is None or gradient.abs().max() == 0
            continue
        assert gradient is not None
        assert (gradient.double() - value.grad).norm() <= 1e-5 * value.grad.norm(), name
        assert active == 0 or gradient.abs().max() > 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masking_gives_exactly_what_chosen_blocks_give_and_a_blocks_nan_stays_with_those_that_chose_it(
    dtype: torch.dtype,
) -> None:
    router = normal(0, 2, 4).requires_grad_()
    routing = route_blocks(normal(1, 3, 4), normal(2, 3, 4), router, router, 1, "topk")
    routing.chosen_BM = torch.tensor([[True, False], [False, True], [True, False]])
    x, y = normal(3, 3, 5, 4, dtype=dtype), normal(4, 3, 5, 4, dtype=dtype) * 1000
    y[1] = float("nan")
    (out,) = masked(routing, 0, [x], [y])
    assert out.dtype == dtype
    assert torch.equal(out, torch.stack([y[0], x[1], y[2]]))


def test_balance_loss_is_gshards_over_the_global_batch() -> None:
    router_x, router_y = normal(0, 4, 8).requires_grad_(), normal(1, 4, 8)
    ranks = [
        route_blocks(normal(2 + rank, 3, 8), normal(4 + rank, 3, 8), router_x, router_y, 2, "topk") for rank in range(2)
    ]
    fractions = torch.stack([choice_fractions(rank) for rank in ranks]).mean(dim=0)
    losses = torch.stack([block_balance_loss(rank, fractions) for rank in ranks])
    p = torch.cat([rank.logits_BM for rank in ranks]).detach().double().softmax(dim=1)
    picked = torch.cat([rank.chosen_BM for rank in ranks]).double()
    expected = sum(4 / (6 * 2) * picked[:, i].sum() * p[:, i].sum() / 6 for i in range(4))
    torch.testing.assert_close(losses.mean().double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(losses.mean(), router_x)
    assert gradient.abs().max() > 1e-4


def test_balance_loss_is_one_for_uniform_choices_more_for_a_favourite_and_zero_without_active_blocks() -> None:
    uniform = BlockRouting(chosen_BM=torch.eye(4).bool(), logits_BM=torch.zeros(4, 4), active=1)
    assert block_balance_loss(uniform, choice_fractions(uniform)) == 1
    logits = torch.tensor([[5.0, 0, 0, 0]]).expand(4, 4)
    favourite = BlockRouting(chosen_BM=logits > 0, logits_BM=logits, active=1)
    assert block_balance_loss(favourite, choice_fractions(favourite)) > 3.8
    none = BlockRouting(chosen_BM=torch.zeros(4, 4).bool(), logits_BM=torch.zeros(4, 4), active=0)
    assert block_balance_loss(none, choice_fractions(none)) == 0


def test_block_choice_is_the_cross_entropy_to_the_chances_of_the_errors() -> None:
    router = normal(0, 3, 8).requires_grad_()
    routing = route_blocks(normal(1, 5, 8), normal(2, 5, 8), router, router, 1, "topk")
    errors = normal(3, 5, 3).abs()
    loss = block_choice_loss(routing, errors)
    p = routing.logits_BM.detach().double().softmax(dim=1)
    q = (-errors.double() / (0.1 * errors.double().mean())).softmax(dim=1)
    torch.testing.assert_close(loss.double(), -(q * p.log()).sum(dim=1).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(block_choice_loss(routing, 1000 * errors), loss)
    (gradient,) = torch.autograd.grad(loss, routing.logits_BM)
    torch.testing.assert_close(gradient.double(), (p - q) / 5, rtol=1e-4, atol=1e-6)


def test_a_router_that_is_sure_of_the_wrong_block_learns_the_best_one_for_each_sample() -> None:
    """The gradient of `masked` is p (1 - p) times something: nothing at p = 1, where a collapsed router stays."""
    vec = torch.cat([normal(0, 64, 4), torch.ones(64, 1)], dim=1)  # with a part that all samples share, as FLUX's has
    x, errors = torch.zeros_like(vec), torch.stack([5 + vec[:, 0], 5 - vec[:, 0], torch.full((64,), 9.0)], dim=1)
    router = torch.tensor([[0.0], [0.0], [50.0]]).repeat(1, 5).requires_grad_()
    optimizer = torch.optim.Adam([router], lr=1.0)
    for _ in range(150):
        optimizer.zero_grad()
        block_choice_loss(route_blocks(x, vec, router, router, 1, "topk"), errors).backward()
        optimizer.step()
    chosen_BM = route_blocks(x, vec, router, router, 1, "topk").chosen_BM
    right_B = chosen_BM.int().argmax(dim=1) == errors.argmin(dim=1)
    assert right_B.float().mean() > 0.9


# Initialisation


def observations(n: int, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features off the origin and of very different sizes, as FLUX's, and changes that depend on both kinds of them."""
    x, vec = normal(seed, n, hidden) * 50 + 30, normal(seed + 1, n, hidden) * 0.2 - 1
    change = 20 + (x - 30) @ normal(2, hidden, 4) / 50 + 2 * (vec + 1) @ normal(3, hidden, 4)
    return x, vec, change + torch.tensor([0.0, 1.0, 2.0, -1.0])


def test_ridge_routers_choose_the_blocks_that_change_their_input_most_on_samples_they_have_not_seen() -> None:
    routers = ridge_block_routers(*observations(120, 16))
    x, vec, change = observations(200, 16, seed=100)
    routing = route_blocks(x, vec, routers.x_MH, routers.y_MH, 1, "topk")
    best = change.argmax(dim=1)
    right = routing.chosen_BM.float().argmax(dim=1) == best
    favourite = (best == best.mode().values).float().mean()
    assert right.float().mean() > 0.9
    assert favourite < 0.6  # of no use: one block for all


def test_ridge_routers_know_of_a_constant_preference_though_they_have_no_bias() -> None:
    x, vec, _ = observations(60, 16)
    routers = ridge_block_routers(x, vec, torch.tensor([0.0, 3.0, 1.0, 2.0]).expand(60, 4))
    x, vec, _ = observations(50, 16, seed=100)
    assert chosen(route_blocks(x, vec, routers.x_MH, routers.y_MH, 2, "topk")) == [{1, 3}] * 50


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_ridge_logits_vary_by_one_whatever_the_units(scale: float) -> None:
    x, vec, change = observations(80, 16)
    routers = ridge_block_routers(x * scale, vec, change * scale)
    logits = route_blocks(x * scale, vec, routers.x_MH, routers.y_MH, 1, "topk").logits_BM
    assert (routers.x_MH.dtype, routers.x_MH.shape, routers.y_MH.shape) == (torch.float32, (4, 16), (4, 16))
    assert logits.std() == pytest.approx(1, abs=0.01)
    plain = ridge_block_routers(x, vec, change)
    torch.testing.assert_close(routers.y_MH, plain.y_MH, rtol=1e-3, atol=1e-4)


def test_ridge_routers_are_the_least_squares_of_their_ridge() -> None:
    """Against the primal normal equations, literally, with every ridge tried on every observation left out."""
    x, vec, change = (value.double() for value in observations(12, 5))
    y = change - change.mean(dim=1, keepdim=True)
    features = torch.cat([x, vec], dim=1)
    features = features / features.square().mean(dim=0).sqrt()
    unit = features.square().sum() / 12

    def fit(rows: Tensor, ridge: float) -> Tensor:
        gram = features[rows].T @ features[rows] + ridge * unit * torch.eye(10, dtype=torch.float64)
        return torch.linalg.solve(gram, features[rows].T @ y[rows])

    every = torch.arange(12)
    left_out = {
        ridge: sum((y[i] - features[i] @ fit(every[every != i], ridge)).square().sum() for i in range(12))
        for ridge in BLOCK_RIDGES
    }
    weight = fit(every, min(left_out, key=lambda ridge: float(left_out[ridge])))
    logits = features @ weight / (features @ weight).square().mean().sqrt()
    routers = ridge_block_routers(x, vec, change)
    found = route_blocks(x.float(), vec.float(), routers.x_MH, routers.y_MH, 1, "topk").logits_BM
    torch.testing.assert_close(found.double(), logits, rtol=1e-4, atol=1e-4)


def test_ridge_routers_cope_with_far_fewer_observations_than_features_and_a_feature_that_never_varies() -> None:
    x, vec, change = observations(10, 64)
    x[:, 0] = 0
    routers = ridge_block_routers(x, vec, change)
    assert routers.x_MH.isfinite().all()
    assert routers.x_MH[:, 0].abs().max() == 0


def test_ridge_routers_refuse_what_teaches_nothing() -> None:
    x, vec, change = observations(10, 8)
    with pytest.raises(ValueError, match="There are 1 observations"):
        ridge_block_routers(x[:1], vec[:1], change[:1])
    with pytest.raises(ValueError, match="change their input alike"):
        ridge_block_routers(x, vec, torch.ones(10, 4))


def test_random_routers_differ_and_are_not_zero() -> None:
    routers = random_block_routers(3, 64, torch.Generator().manual_seed(0))
    assert routers.x_MH.shape == routers.y_MH.shape == (3, 64)
    assert not torch.equal(routers.x_MH, routers.y_MH)
    logits = route_blocks(normal(0, 200, 64), normal(1, 200, 64), routers.x_MH, routers.y_MH, 1, "topk").logits_BM
    assert 0.4 < logits.std() < 1.2

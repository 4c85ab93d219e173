"""A compute budget in diffusers: what each forward pass runs, and how a budget ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

from d2m_model.budget import allot
from d2m_model.cost import Tokens
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
from d2m_model.sensitivity import SENSITIVITY, Errors, Sensitivity
from tests.toys.pairs import GROUPS, Pair, inputs, save_pair, velocity

TOKENS = Tokens(image=4, text=3)  # those of `inputs`


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"), groups=GROUPS)


@pytest.fixture
def model(pair: Pair) -> FluxMoETransformer2DModel:
    """A model whose file has a table."""
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)

    def errors(most: int, rate: float) -> Errors:
        return tuple(tuple(2.0 ** -(rate * k * (1 + bin_)) for k in range(most + 1)) for bin_ in range(2))

    table = Sensitivity(
        levels=(1.0, 0.7, 0.0), image_tokens=4, text_tokens=3, samples=1, data="made up",
        ffns={name: errors(12, 0.1 * (1 + place)) for place, name in enumerate(model.moe_ffns())},
        groups=tuple(errors(group.blocks, 2) for group in GROUPS),
    )  # fmt: skip
    model.flux_moe = replace(model.flux_moe, provenance={SENSITIVITY: table.entry()})
    return model


def test_the_noise_level_decides_what_runs(model: FluxMoETransformer2DModel) -> None:
    sigmas = (1.0, 0.9, 0.5, 0.0)
    table = model.flux_moe.sensitivity
    assert table is not None
    expected = allot(model.flux_moe, table, 0.8, TOKENS, sigmas)
    model.set_budget(0.8, torch.tensor(sigmas))
    for sigma in (0.9, 0.5):
        velocity(model, inputs() | {"timestep": torch.tensor([sigma])})
        spending = expected.at(sigma)
        assert {name: moe.router_value for name, moe in model.moe_ffns().items()} == spending.top_k
        assert [router.active for router in model.block_routers()] == spending.active_blocks
    assert model.budget is not None
    assert model.budget.allotment == expected
    assert expected.spendings[0] != expected.spendings[1]


def test_the_end_of_a_budget_brings_back_the_files_own_values(model: FluxMoETransformer2DModel, pair: Pair) -> None:
    own = velocity(model)
    model.set_budget(0.7)
    assert not torch.equal(velocity(model), own)
    model.set_budget(None)
    assert torch.equal(velocity(model), own)
    model.set_budget(0.7)
    model.set_top_k(2)  # the file's own
    assert torch.equal(velocity(model), own)
    model.set_budget(0.7)
    model.train()
    assert torch.isfinite(velocity(model)).all()


@pytest.mark.parametrize("share", [0.0, 1.2])
def test_a_share_that_cannot_be_is_refused(model: FluxMoETransformer2DModel, share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        model.set_budget(share)


def test_a_file_without_a_table_gets_one_k_and_says_so(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    model.set_budget(0.55)
    velocity(model)
    velocity(model)
    assert len({moe.router_value for moe in model.moe_ffns().values()}) == 1
    assert caplog.text.count("has no sensitivity table") == 1
    model.set_budget(1)
    every = velocity(model)
    model.set_top_k(12)
    for router, group in zip(model.block_routers(), GROUPS, strict=True):
        router.active = group.blocks
    assert torch.equal(velocity(model), every)

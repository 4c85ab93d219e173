"""Stand-ins of skipped blocks: their fit, their tensors in a file, what they add in diffusers, and their cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from d2m_model.checkpoint import CheckpointError, check_file
from d2m_model.config import FluxMoEConfig
from d2m_model.conversion.calibration import StreamChange
from d2m_model.conversion.stand_in_fit import fit_stand_in
from d2m_model.cost import Conversion, Tokens, flux
from d2m_model.fields import ConfigError
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
from d2m_model.stand_ins import normed
from d2m_train.distillation.stages import plan_stage, trainable_names
from d2m_train.run_config import StageSection
from tests.toys.pairs import GROUPS, Pair, inputs, save_pair, velocity

RANK = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("stand-ins"), groups=GROUPS, stand_in_rank=RANK)


@pytest.fixture
def model(pair: Pair) -> FluxMoETransformer2DModel:
    return FluxMoETransformer2DModel.from_flux_moe(pair.moe)


# The fit


def tokens(before: torch.Tensor, change: torch.Tensor) -> StreamChange:
    """Return tokens of one sample."""
    return StreamChange(before_nH=before, change_nH=change, tokens_B=torch.tensor([len(before)]))


def test_a_linear_change_of_low_rank_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    before, down, up, bias = (
        torch.randn(*shape, generator=generator) for shape in ((400, 16), (3, 16), (16, 3), (16,))
    )
    change = normed(before) @ down.T @ up.T + bias
    fitted = fit_stand_in(tokens(before, change), rank=3)
    assert (fitted.down_RH.shape, fitted.up_HR.shape, fitted.bias_H.shape) == ((3, 16), (16, 3), (16,))
    assert fitted.error < 1e-3
    found = normed(before) @ fitted.down_RH.T @ fitted.up_HR.T + fitted.bias_H
    assert (found - change).norm() < 1e-3 * change.norm()


def test_a_change_that_has_nothing_to_do_with_the_stream_leaves_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    before, noise = torch.randn(2, 400, 16, generator=generator)
    fitted = fit_stand_in(tokens(before, 5 + noise), rank=3)
    assert (fitted.bias_H - 5).abs().max() < 0.2
    assert fitted.error == pytest.approx(26**-0.5, rel=0.1)


def test_too_few_tokens_are_refused() -> None:
    few = torch.zeros(7, 16)
    with pytest.raises(ValueError, match="There are 7 tokens of the stream; expected 8 or more"):
        fit_stand_in(tokens(few, few), rank=3)


# The file


def test_a_file_without_stand_ins_does_not_name_them(pair: Pair) -> None:
    config = check_file(pair.moe)
    assert config.stand_in_rank == RANK
    assert FluxMoEConfig.from_json(config.to_json()) == config
    without = replace(config, stand_in_rank=None)
    assert "stand_in" not in without.to_json()
    assert FluxMoEConfig.from_json(without.to_json()) == without


def test_a_rank_without_groups_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="stand_in_rank is 8; expected null, or with groups 1 or more"):
        replace(check_file(pair.moe), groups=())


@pytest.mark.parametrize("damage", ["missing", "misshapen", "NaN"])
def test_damaged_stand_ins_are_named(pair: Pair, tmp_path: Path, damage: str) -> None:
    tensors, name = load_file(pair.moe), "block_groups.1.stand_ins.2.joint.down.weight"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].clone() if damage == "misshapen" else tensors[name] * float("nan")
    save_file(tensors, tmp_path / "moe.safetensors")
    with pytest.raises(CheckpointError, match=name):
        check_file(tmp_path / "moe.safetensors")


def test_saving_gives_the_file_back(pair: Pair, model: FluxMoETransformer2DModel, tmp_path: Path) -> None:
    model.save_flux_moe(tmp_path / "moe.safetensors")
    saved, stored = load_file(tmp_path / "moe.safetensors"), load_file(pair.moe)
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())


# In diffusers


@torch.no_grad()
def test_a_skipped_block_adds_its_stand_in(pair: Pair, model: FluxMoETransformer2DModel) -> None:
    """In float64, of the double block whose neighbour runs; the streams go on as they are in a model without groups."""
    tensors, block = load_file(pair.moe), model.transformer_blocks[GROUPS[0].first]
    for router in model.block_routers():
        router.active = 0
    taken: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(_: object, arguments: tuple, keywords: dict, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        taken["txt"] = keywords["encoder_hidden_states"], outputs[0]
        taken["img"] = keywords["hidden_states"], outputs[1]

    block.register_forward_hook(take, with_kwargs=True)
    velocity(model, inputs(2))
    for stream, (before, after) in taken.items():
        down, up, bias = (
            tensors[f"block_groups.0.stand_ins.0.{stream}.{part}"].double()
            for part in ("down.weight", "up.weight", "up.bias")
        )
        x = before.double()
        norm = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(after.double(), x + norm @ down.T @ up.T + bias, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_with_all_blocks_active_stand_ins_do_nothing(model: FluxMoETransformer2DModel) -> None:
    asked, found = inputs(2), []
    for groups_on in (True, False):
        model.groups_on = groups_on
        for router, group in zip(model.block_routers(), GROUPS, strict=True):
            router.active = group.blocks
        found.append(velocity(model, asked))
    assert torch.equal(*found)


def test_training_masks_to_stand_ins_and_trains_them(model: FluxMoETransformer2DModel) -> None:
    asked = inputs(3)
    with torch.no_grad():
        skipping = velocity(model, asked)
    trained = velocity(model.train(), asked)
    torch.testing.assert_close(trained.detach(), skipping, rtol=1e-5, atol=1e-5)
    trained.square().mean().backward()
    stand_ins = {name: tensor for name, tensor in model.named_parameters() if ".stand_ins." in name}
    assert len(stand_ins) == 3 * (2 * 2 + 3)
    assert all(tensor.grad is not None for tensor in stand_ins.values())
    assert stand_ins.keys() <= trainable_names(model, plan_stage("blocks", model.flux_moe, StageSection()))


def test_beside_stand_ins_blocks_are_not_compared(model: FluxMoETransformer2DModel) -> None:
    """The stand-ins of a group change the input of its next block, which is then not the group's own."""
    for router in model.train().block_routers():
        router.compares = True
    velocity(model, inputs(2))
    assert all(router.compared is None for router in model.block_routers())


# The cost


def test_stand_ins_cost_what_their_products_do(pair: Pair) -> None:
    config, tokens = check_file(pair.moe), Tokens(image=64, text=16)
    costs = {
        rank: flux(config.dims, Conversion.of(replace(config, stand_in_rank=rank)), tokens) for rank in (None, RANK)
    }
    per_token = 2 * RANK * config.dims.hidden_size
    # One of two double blocks, two streams of 80 tokens in all; and one of three single blocks on all 80 tokens.
    assert costs[RANK].flops - costs[None].flops == pytest.approx(2 * per_token * 2 * 80)
    assert costs[RANK].total - costs[None].total == 7 * (per_token + config.dims.hidden_size)
    everything = Conversion.of(config, active_blocks=[group.blocks for group in config.groups])
    plain = Conversion.of(replace(config, stand_in_rank=None), active_blocks=[group.blocks for group in config.groups])
    assert flux(config.dims, everything, tokens).flops == flux(config.dims, plain, tokens).flops

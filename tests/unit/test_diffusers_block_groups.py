"""Block groups in diffusers: of every sample the chosen blocks run, whatever else the model is used with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

from d2m_model.config import Selection
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer
from d2m_model.hosts.diffusers.modules import GroupOutputs
from d2m_model.mob import block_balance_loss, choice_fractions
from tests.toys.pairs import GROUPS, Pair, inputs, save_pair, velocity

DOUBLES, SINGLES = ({*range(group.first, group.first + group.blocks)} for group in GROUPS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("grouped"), groups=GROUPS)


@pytest.fixture
def model(pair: Pair) -> FluxMoETransformer2DModel:
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    model.set_top_k(12)  # the dense FFNs
    return model


class Skipped(nn.Module):
    """A block that is not there."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states


def dense_without(pair: Pair, double: set[int], single: set[int]) -> nn.Module:
    """diffusers' own model without some blocks, the others at their index."""
    dense = load_transformer(pair.dense)
    for index in double:
        dense.transformer_blocks[index] = Skipped()
    for index in single:
        dense.single_transformer_blocks[index] = Skipped()
    return dense


def of_sample(asked: dict[str, Any], index: int) -> dict[str, Any]:
    return {key: value if key.endswith("_ids") else value[index : index + 1] for key, value in asked.items()}


def choices_of(model: FluxMoETransformer2DModel, asked: dict[str, Any]) -> list[Tensor]:
    """bool [B, M] of every group, as training sees them."""
    model.train()
    velocity(model, asked)
    found = [router.routing.chosen_BM for router in model.block_routers() if router.routing is not None]
    model.clear_routings()
    model.eval()
    return found


@torch.no_grad()
@pytest.mark.parametrize("every", [False, True])
def test_no_and_all_active_blocks_are_the_dense_model_without_and_with_them(
    pair: Pair, model: FluxMoETransformer2DModel, every: bool
) -> None:
    for router, group in zip(model.block_routers(), GROUPS, strict=True):
        router.active = group.blocks if every else 0
    asked, skipped = inputs(2), (set(), set()) if every else (DOUBLES, SINGLES)
    torch.testing.assert_close(velocity(model, asked), velocity(dense_without(pair, *skipped), asked))


@torch.no_grad()
@pytest.mark.parametrize("selection", ["topk", "window"])
def test_every_sample_of_a_batch_runs_the_blocks_of_its_own(
    pair: Pair, model: FluxMoETransformer2DModel, selection: Selection
) -> None:
    """There are as many samples as tokens, so that code that confuses the two axes fails here."""
    for router in model.block_routers():
        router.selection = selection
    asked = inputs(7)
    doubles, singles = choices_of(model, asked)
    assert len({tuple(row) for row in doubles.tolist()}) > 1
    assert len({tuple(row) for row in singles.tolist()}) > 1
    assert doubles.sum(1).tolist() == [1] * 7
    assert singles.sum(1).tolist() == [2] * 7
    if selection == "window":
        assert [True, False, True] not in singles.tolist()
    together = velocity(model, asked)
    for index in range(7):
        alone = velocity(model, of_sample(asked, index))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-5)
        if index > 2:
            continue
        left_out = [
            {g.first + i for i in range(g.blocks) if not c[index, i]}
            for g, c in zip(GROUPS, (doubles, singles), strict=True)
        ]
        dense = velocity(dense_without(pair, *left_out), of_sample(asked, index))
        torch.testing.assert_close(alone, dense, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_residuals_of_a_controlnet_arrive_at_their_block_though_it_is_skipped(
    pair: Pair, model: FluxMoETransformer2DModel
) -> None:
    asked = inputs(2)
    for router in model.block_routers():
        router.active = 0
    generator = torch.Generator().manual_seed(9)
    residuals = {
        "controlnet_block_samples": [torch.randn(2, 4, 128, generator=generator) for _ in range(3)],
        "controlnet_single_block_samples": [torch.randn(2, 4, 128, generator=generator) for _ in range(2)],
    }
    dense = dense_without(pair, DOUBLES, SINGLES)
    expected = velocity(dense, asked, **residuals)
    torch.testing.assert_close(velocity(model, asked, **residuals), expected)
    assert (expected - velocity(dense, asked)).norm() > 0.1 * expected.norm()


@torch.no_grad()
def test_training_masks_what_inference_skips_and_keeps_its_choices_until_they_are_cleared(
    model: FluxMoETransformer2DModel,
) -> None:
    asked = inputs(3)
    skipped = velocity(model, asked)
    assert all(router.routing is None for router in model.block_routers())
    assert all(moe.routing is None for moe in model.moe_ffns().values())
    masked = velocity(model.train(), asked)
    torch.testing.assert_close(masked, skipped, rtol=1e-5, atol=1e-5)
    assert all(router.routing is not None for router in model.block_routers())
    assert all(moe.routing is not None for moe in model.moe_ffns().values())
    model.clear_routings()
    assert all(moe.routing is None for moe in (*model.moe_ffns().values(), *model.block_routers()))
    velocity(model, asked)
    velocity(model.eval(), asked)
    assert all(moe.routing is None for moe in (*model.moe_ffns().values(), *model.block_routers()))


def gradients(model: FluxMoETransformer2DModel, asked: dict[str, Any]) -> dict[str, Tensor | None]:
    """Return gradients of a loss of everything that training reads: output, token routers, block routers."""
    model.zero_grad()
    model.set_top_k(2)
    output = velocity(model, asked)
    loss = output.square().mean()
    routings = [moe.routing for moe in model.moe_ffns().values()]
    loss = loss + sum(routing.probabilities_TE.square().sum() for routing in routings if routing is not None)
    for router in model.block_routers():
        assert router.routing is not None
        loss = loss + block_balance_loss(router.routing, choice_fractions(router.routing))
        if router.compared is not None:
            loss = loss + sum(stream.square().sum() for after in router.compared.after for stream in after)
    model.clear_routings()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("how", "compares"), [("of diffusers", False), ("of diffusers", True), ("around every block", True)]
)
def test_checkpointed_gradients_are_the_gradients(model: FluxMoETransformer2DModel, how: str, compares: bool) -> None:
    asked = inputs(3)
    model.train()
    for router in model.block_routers():
        router.compares = compares
    expected = gradients(model, asked)
    if how == "of diffusers":
        model.enable_gradient_checkpointing()
    else:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        apply_activation_checkpointing(model, check_fn=lambda module: hasattr(module, "member"))
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model, asked).items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(found[name], gradient, msg=name)
    for name in ("block_groups.0.router_x.weight", "block_groups.1.router_y.weight"):
        assert expected[name].abs().max() > 1e-5  # type: ignore[union-attr]
    # What the backward pass ran again is not remembered.
    assert all(moe.routing is None for moe in (*model.moe_ffns().values(), *model.block_routers()))


def compared(model: FluxMoETransformer2DModel, asked: dict[str, Any]) -> tuple[Tensor, GroupOutputs, Tensor]:
    """Return velocity, what the first group's blocks gave alone, and the blocks that were chosen."""
    found = velocity(model, asked)
    router = model.block_routers()[0]
    assert router.compared is not None
    assert router.routing is not None
    return found, router.compared, router.routing.chosen_BM


def test_blocks_are_compared_on_the_groups_input_and_the_result_stays(model: FluxMoETransformer2DModel) -> None:
    asked = inputs(3)
    plain = velocity(model.train(), asked)
    router, last = model.block_routers()[0], model.transformer_blocks[max(DOUBLES)]
    router.compares = True
    group_outputs: list[Any] = []
    last.register_forward_hook(lambda *arguments: group_outputs.append(arguments[-1]))
    found, outputs, chosen_BM = compared(model, asked)
    assert torch.equal(found, plain)
    for sample, block in enumerate(chosen_BM.int().argmax(dim=1).tolist()):
        for stream, after in zip(outputs.after[block], group_outputs[0], strict=True):
            assert torch.equal(stream[sample], after[sample])
    with torch.no_grad():  # every sample chooses the other one of the two blocks
        for weight in (router.router_x.weight, router.router_y.weight):
            weight.neg_()
    _, others, other_BM = compared(model, asked)
    assert torch.equal(other_BM, ~chosen_BM)
    for one, another in zip(outputs.after, others.after, strict=True):
        torch.testing.assert_close(one, another)
    assert all(not stream.requires_grad for stream in others.given)


def test_blocks_that_were_not_chosen_learn_and_teach_nothing_to_blocks_ahead(model: FluxMoETransformer2DModel) -> None:
    model.train().block_routers()[0].compares = True
    _, outputs, chosen_BM = compared(model, inputs(3))
    idle = int(chosen_BM[0].int().argmin())
    outputs.after[idle][1][0].square().sum().backward()
    assert model.transformer_blocks[min(DOUBLES) + idle].attn.to_q.weight.grad.abs().max() > 0
    assert model.transformer_blocks[0].attn.to_q.weight.grad.abs().max() == 0


def test_a_block_called_by_itself_runs(model: FluxMoETransformer2DModel) -> None:
    """Blockwise training and other tools call blocks this way."""
    block = model.transformer_blocks[2]
    rotary = model.pos_embed(torch.zeros(7, 3))
    text, image = block(torch.ones(2, 4, 128), torch.ones(2, 3, 128), torch.ones(2, 128), rotary)
    assert (text.shape, image.shape) == ((2, 3, 128), (2, 4, 128))
    assert not torch.equal(image, torch.ones(2, 4, 128))


@torch.no_grad()
def test_a_cache_of_blocks_works_on_them(model: FluxMoETransformer2DModel) -> None:
    from diffusers import FirstBlockCacheConfig

    asked, other = inputs(2), inputs(2, seed=1)
    expected = velocity(model, asked), velocity(model, other)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        torch.testing.assert_close(velocity(model, asked), expected[0])
        torch.testing.assert_close(velocity(model, other), expected[1])
    model.disable_cache()


@torch.no_grad()
def test_groups_come_back_from_the_file_and_from_save_pretrained(
    pair: Pair, model: FluxMoETransformer2DModel, tmp_path: Path
) -> None:
    model.save_flux_moe(tmp_path / "again.safetensors")
    model.save_pretrained(tmp_path / "folder", max_shard_size="1MB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    stored, expected = load_file(pair.moe), model.state_dict()
    written = load_file(tmp_path / "again.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    again = FluxMoETransformer2DModel.from_pretrained(tmp_path / "folder")
    found = again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert again.flux_moe == model.flux_moe
    assert again.flux_moe.groups == GROUPS
    again.set_top_k(12)
    torch.testing.assert_close(velocity(again, inputs(3)), velocity(model, inputs(3)))

"""Every kind of FLUX-MoE file as a diffusers model and back, by every way that diffusers and the trainer have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")

from d2m_model.checkpoint import CheckpointError, check_file, optional_tensors
from d2m_model.hosts.diffusers import (
    FluxMoETransformer2DModel,
    flux_moe_specs,
    flux_moe_tensors,
    load_transformer,
)
from d2m_model.routers import CapacityRouter
from tests.toys.pairs import GROUPS, Pair, inputs, save_pair, velocity

CAPACITY = CapacityRouter(capacity=2.0, width=16)
KINDS: dict[str, dict[str, Any]] = {
    "compressed, with means, bfloat16": {"rank": 16, "mean": True, "dtype": torch.bfloat16},
    "grouped": {"groups": GROUPS},
    "capacity": {"capacity": CAPACITY, "mean": True},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("kind"), **KINDS[request.param])


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == found[name].dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def test_a_file_becomes_a_model_and_the_same_file_again(pair: Pair, tmp_path: Path) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    assert check_file(pair.moe) == model.flux_moe
    model.save_flux_moe(tmp_path / "again.safetensors")
    stored = load_file(pair.moe)
    assert same(load_file(tmp_path / "again.safetensors"), stored)
    assert check_file(tmp_path / "again.safetensors") == model.flux_moe
    model.save_flux_moe(tmp_path / "half.safetensors", dtype=torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    for name, tensor in stored.items():
        added = any(
            part in name for part in ("router", "expert_mean", "capacity", "threshold", "adaln_in", "neuron_", "d2m_")
        )
        assert torch.equal(half[name], tensor if added else tensor.half()), name


def test_an_empty_model_has_every_tensor_of_the_full_one(pair: Pair) -> None:
    full = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    optional = [name for name in optional_tensors(full.flux_moe) if name in load_file(pair.moe)]
    with torch.device("meta"):
        empty = FluxMoETransformer2DModel(full.flux_moe, optional)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert [(name, t.shape) for name, t in empty.named_parameters()] == [
        (name, t.shape) for name, t in full.named_parameters()
    ]
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in full.state_dict().items()
    }


def test_save_pretrained_and_from_pretrained_give_the_same_model(pair: Pair, tmp_path: Path) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "FluxMoETransformer2DModel"
    again = FluxMoETransformer2DModel.from_pretrained(tmp_path, torch_dtype=model.dtype)
    assert same(again.state_dict(), model.state_dict())
    assert again.flux_moe == model.flux_moe
    assert (again.config.in_channels, again.config.guidance_embeds) == (64, True)
    half = FluxMoETransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.transformer_blocks[2].ff.routed_up.dtype == torch.float16
    assert half.transformer_blocks[2].ff.router.weight.dtype == torch.float32


# One file that has everything


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("every"), rank=16, mean=True, groups=GROUPS, capacity=CAPACITY)


def test_from_single_file_takes_a_path_or_tensors(every: Pair) -> None:
    expected = FluxMoETransformer2DModel.from_flux_moe(every.moe).state_dict()
    stored = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(every.moe).items()}
    for given in (every.moe, str(every.moe), stored):
        assert same(FluxMoETransformer2DModel.from_single_file(given).state_dict(), expected)
    half = FluxMoETransformer2DModel.from_single_file(every.moe, torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    with pytest.raises(TypeError, match="does not take config"):
        FluxMoETransformer2DModel.from_single_file(every.moe, config="a")


def test_a_single_file_is_quantised_as_from_pretrained_quantises(every: Pair, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    def config() -> TorchAoConfig:
        return TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))

    whole = FluxMoETransformer2DModel.from_single_file(every.moe, torch_dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path)
    folder = FluxMoETransformer2DModel.from_pretrained(
        tmp_path, quantization_config=config(), torch_dtype=torch.bfloat16
    )
    file = FluxMoETransformer2DModel.from_single_file(
        every.moe, quantization_config=config(), torch_dtype=torch.bfloat16
    )
    quantised = {name for name, weight in file.named_parameters() if type(weight) is not torch.nn.Parameter}
    assert "transformer_blocks.0.attn.to_q.weight" in quantised
    assert not [name for name in quantised if "router" in name or "adaln_in" in name]
    assert quantised == {name for name, weight in folder.named_parameters() if type(weight) is not torch.nn.Parameter}
    asked = {name: tensor.bfloat16() for name, tensor in inputs().items()}
    assert torch.equal(velocity(file, asked), velocity(folder, asked))
    assert (velocity(file, asked) - velocity(whole, asked)).norm() < 0.1 * velocity(whole, asked).norm()


@torch.no_grad()
def test_models_that_are_offloaded_layer_by_layer_run(every: Pair) -> None:
    """Weights come in when a module is called, and only then."""
    from accelerate import cpu_offload

    model = FluxMoETransformer2DModel.from_flux_moe(every.moe, torch.float32)
    expected = velocity(model, inputs(3))
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(velocity(model, inputs(3)), expected)


@torch.no_grad()
def test_samples_of_a_batch_do_not_depend_on_each_other(every: Pair) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(every.moe, torch.float32)
    asked = inputs(3)
    together = velocity(model, asked)
    for index in range(3):
        alone = {key: value if key.endswith("_ids") else value[index : index + 1] for key, value in asked.items()}
        torch.testing.assert_close(together[index : index + 1], velocity(model, alone), rtol=1e-4, atol=1e-5)


def test_tensors_come_one_by_one_and_every_rank_is_asked_for_the_same_parts(every: Pair) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(every.moe)
    parts: list[int] = []

    def whole(tensor: Tensor) -> Tensor:
        parts.append(tensor.data_ptr())
        return tensor

    seen, specs = 0, flux_moe_specs(model, model.flux_moe)
    for name, tensor in flux_moe_tensors(model, model.flux_moe, whole):
        assert specs[name] == (tensor.dtype, tuple(tensor.shape))
        assert len(parts) - seen <= 5, name  # q, k, v, shared and routed: those of this tensor alone
        seen = len(parts)
    assert sorted(parts) == sorted(tensor.data_ptr() for tensor in model.state_dict().values())


@torch.no_grad()
def test_without_experts_the_shared_ones_run_alone(every: Pair) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(every.moe)
    for moe in model.moe_ffns().values():
        moe.experts_on = False
    alone = velocity(model)
    model.set_capacity_factor(0)
    assert torch.equal(velocity(model), alone)
    for moe in model.moe_ffns().values():
        moe.experts_on = True
    assert not torch.equal(velocity(model), alone)  # the means of the experts
    model.set_capacity_factor(1)
    assert not torch.equal(velocity(model), alone)
    model.train()
    for moe in model.moe_ffns().values():
        moe.experts_on = False
    velocity(model)
    assert all(moe.routing is None for moe in model.moe_ffns().values())


@torch.no_grad()
def test_all_experts_and_blocks_of_a_compressed_file_are_its_teacher(tmp_path: Path) -> None:
    """Whose modulations lose nothing by the compression; in diffusers as on every host."""
    pair = save_pair(tmp_path, rank=16, groups=GROUPS)
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    model.set_top_k(12)
    for router in model.block_routers():
        router.active = len(router.router_x.weight)
    dense = velocity(load_transformer(pair.dense), inputs(2))
    torch.testing.assert_close(velocity(model, inputs(2)), dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="top_k is 13; expected 0 to 12"):
        model.set_top_k(13)


@pytest.mark.parametrize("top_k", [2.5, 2.0, "2", True, None, -1, 13])
def test_a_number_of_experts_that_is_none_is_refused_at_once(every: Pair, top_k: Any) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(every.moe)
    with pytest.raises(ValueError, match="top_k is"):
        model.set_top_k(top_k)


@pytest.mark.parametrize("factor", [-0.5, float("nan"), float("inf"), "1", True])
def test_a_capacity_factor_that_is_none_is_refused_at_once(every: Pair, factor: Any) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(every.moe)
    with pytest.raises(ValueError, match="capacity factor is"):
        model.set_capacity_factor(factor)


def test_a_model_made_from_a_configuration_alone_can_be_trained(every: Pair) -> None:
    torch.manual_seed(0)
    model = FluxMoETransformer2DModel(check_file(every.moe)).train()
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    velocity(model, inputs(4)).square().mean().backward()
    assert all(moe.router.weight.abs().max() > 0 for moe in model.moe_ffns().values())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(router.routing is not None for router in model.block_routers())


def test_a_quantised_file_is_refused(every: Pair, tmp_path: Path) -> None:
    tensors = load_file(every.moe)
    name = "double_blocks.0.img_attn.qkv"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "float8.safetensors")  # stored so, not quantised
    model = FluxMoETransformer2DModel.from_flux_moe(tmp_path / "float8.safetensors")
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    tensors[f"{name}.scale_weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "scaled.safetensors")
    with pytest.raises(CheckpointError, match=r"is quantised \(double_blocks.0.img_attn.qkv.scale_weight\)"):
        FluxMoETransformer2DModel.from_flux_moe(tmp_path / "scaled.safetensors")


def test_a_pipeline_is_saved_and_loaded_with_it(every: Pair, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline

    model = FluxMoETransformer2DModel.from_flux_moe(every.moe)
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=model, **others).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **others)
    assert type(loaded.transformer) is FluxMoETransformer2DModel
    assert loaded.transformer.flux_moe == model.flux_moe
    assert same(loaded.transformer.state_dict(), model.state_dict())

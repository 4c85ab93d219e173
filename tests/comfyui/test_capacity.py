"""Files with capacity routers (DiffMoE's) in ComfyUI, against the dense teacher and a literal reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2m_model.checkpoint import check_file
from d2m_model.config import BlockGroup
from d2m_model.routers import CapacityRouter
from d2m_model.tensor_file import TensorFile
from demo.in_process import Comfy
from tests.comfyui import test_sampling
from tests.comfyui.conftest import Pair, with_lora
from tests.comfyui.test_saving import load, output, save  # noqa: F401 (fixture)
from tests.toys import files
from tests.toys.compare import distance

DEVICE = torch.device("cpu")
ROUTER = CapacityRouter(capacity=2.0, width=16)
EVERYTHING = 1e9  # a capacity at which every expert takes every token


@dataclass
class Capacity:
    tensors: dict[str, Tensor]
    file: Path
    moe: Any


@pytest.fixture(scope="module")
def uneven(host: Comfy, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Capacity:
    tensors = files.split(pair.dense, capacity=ROUTER)
    file = files.save(tensors, tmp_path_factory.mktemp("capacity") / "capacity.safetensors")
    return Capacity(tensors, file, host.load(file))


def under(host: Comfy, model: Any, **settings: Any) -> Any:
    return host.with_settings(model, **settings)


def literal_gates(x: Tensor, tensors: dict[str, Tensor], ffn: str, factor: float, gate: str) -> Tensor:
    """Return each token's weight for each expert, [B, T, E]: zero if the prediction does not pass the threshold."""

    def linear(x: Tensor, layer: str) -> Tensor:
        return F.linear(x, tensors[f"{ffn}.{layer}.weight"].double(), tensors[f"{ffn}.{layer}.bias"].double())

    x = x.double()
    alpha = linear(x, "router").softmax(-1)
    predicted = linear(F.silu(linear(x, "capacity.in_layer")), "capacity.out_layer").sigmoid()
    threshold = tensors[f"{ffn}.threshold"].double()
    passes = factor * predicted / (1 - predicted) > threshold / (1 - threshold)
    weight = torch.ones_like(alpha) if gate == "sum" else tensors[f"{ffn}.capacity.scale"].double() * alpha
    return (passes * weight).float()


@pytest.mark.parametrize("gate", ["sum", "normalised"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_experts_take_the_tokens_that_pass_their_threshold(
    host: Comfy,
    pair: Pair,
    uneven: Capacity,
    without_pack: None,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    gate: str,
) -> None:
    reference, shares = host.load(uneven.file), []

    def gates(x: Tensor, tensors: dict[str, Tensor], ffn: str, factor: Any, gate: str) -> Tensor:
        found = literal_gates(x, tensors, ffn, factor, gate)
        shares.append((found > 0).float().sum(-1))
        return found

    monkeypatch.setattr(test_sampling, "gates_of", gates)
    test_sampling.route_literally(reference.model.diffusion_model, uneven.tensors, factor, gate)  # type: ignore[arg-type]
    expected = host.sample(reference, (2, 8, 24))
    settings = {"gate": gate} | ({} if factor == 1 else {"capacity": factor})
    assert distance(host.sample(under(host, uneven.moe, **settings), (2, 8, 24)), expected) <= 1e-5
    assert distance(expected, host.sample(pair.teacher, (2, 8, 24))) >= 1e-2
    assert max(float(share.std()) for share in shares) > 0.5  # tokens differ in their number of experts


def test_at_full_capacity_it_paints_what_the_teacher_paints(host: Comfy, pair: Pair, uneven: Capacity) -> None:
    found = host.sample(under(host, uneven.moe, capacity=EVERYTHING))
    assert distance(found, host.sample(pair.teacher)) <= 1e-5


def test_without_capacity_the_shared_experts_paint_alone(host: Comfy, pair: Pair, uneven: Capacity) -> None:
    found = host.sample(under(host, uneven.moe, capacity=0))
    assert distance(found, host.sample(host.top_k(pair.moe, 0))) <= 1e-6


def test_a_batch_does_not_change_a_sample(host: Comfy, uneven: Capacity) -> None:
    batch = host.sample(uneven.moe, (3, 8, 8), seed=4)
    assert distance(batch[:1], host.sample(uneven.moe, (1, 8, 8), seed=4)) <= 1e-5


def test_clones_with_different_capacity_do_not_disturb_each_other(host: Comfy, uneven: Capacity) -> None:
    models = [uneven.moe, *(under(host, uneven.moe, capacity=factor) for factor in (0.5, 1, 3.0))]
    first = [host.sample(model) for model in models]
    again = [host.sample(model) for model in models[::-1]][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], first[2])
    assert len({tuple(latents.flatten().tolist()) for latents in first}) == 3


def test_experts_that_pass_nobody_leave_their_mean(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    mean = files.split(pair.dense, capacity=ROUTER, mean=True)
    moe = host.load(files.save(mean, tmp_path / "mean.safetensors"))
    top_k = host.load(files.save(files.split(pair.dense, mean=True), tmp_path / "top_k.safetensors"))
    none, every = (host.sample(under(host, moe, capacity=factor)) for factor in (0, EVERYTHING))
    assert distance(none, host.sample(host.top_k(top_k, 0))) <= 1e-6
    assert distance(every, host.sample(pair.teacher)) <= 1e-5


def test_it_goes_with_block_groups(host: Comfy, pair: Pair, uneven: Capacity, tmp_path: Path) -> None:
    group = BlockGroup(kind="single", first=0, blocks=3, active=1, selection="topk")
    both = host.load(
        files.save(files.split(pair.dense, capacity=ROUTER, groups=(group,)), tmp_path / "both.safetensors")
    )
    expected = host.sample(uneven.moe, (3, 8, 8))
    assert torch.equal(host.sample(under(host, both, active_blocks=3), (3, 8, 8)), expected)
    assert distance(host.sample(both, (3, 8, 8)), expected) >= 1e-2


# What is said


def test_top_ks_capacity_steers_it_and_top_k_is_not_used(host: Comfy, uneven: Capacity) -> None:
    def sample(top_k: int, capacity: float) -> Tensor:
        model = host.run("D2MTopK", model=uneven.moe, top_k=top_k, gate="as in the file", capacity=capacity)
        return host.sample(model, (1, 8, 8))

    expected = host.sample(under(host, uneven.moe, capacity=0.5), (1, 8, 8))
    assert torch.equal(sample(64, 0.5), expected)
    assert torch.equal(sample(0, 1.0), host.sample(uneven.moe, (1, 8, 8)))


@pytest.mark.parametrize("factor", [-0.5, float("inf"), float("nan")])
def test_an_impossible_capacity_is_said(host: Comfy, uneven: Capacity, factor: float) -> None:
    with pytest.raises(ValueError, match=r"The capacity factor is .*; expected 0 \(no experts\) or more"):
        host.sample(under(host, uneven.moe, capacity=factor), steps=1)


# The host's features


def test_low_vram_casts_the_predictors_too(host: Comfy, uneven: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ops

    host.unload()
    cast, returned = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight
    casts: list[Any] = []
    returns: list[Any] = []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, *a, **k: (casts.append(s), cast(s, *a, **k))[1])
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda s, *a: (returns.append(s), returned(s, *a))[1])
    moe, found = uneven.moe.clone(), []
    flux = moe.model.diffusion_model
    for memory in (1, 1e32):
        moe.load(DEVICE, lowvram_model_memory=memory, full_load=memory > 1)
        casts.clear()
        returns.clear()
        found.append(host.evaluate(moe))
        moe.unpatch_model(DEVICE)
        for owner in (flux.double_blocks[1].txt_mlp, flux.single_blocks[0]):
            for layer in (owner.router, owner.capacity.in_layer, owner.capacity.out_layer):
                assert casts.count(layer) == returns.count(layer) == 1
    assert torch.equal(*found)


def routing_tensors(tensors: Any) -> list[str]:
    return [name for name in tensors if ".capacity." in name or name.endswith((".threshold", ".router.weight"))]


def test_what_routes_keeps_its_files_precision(host: Comfy, uneven: Capacity, tmp_path: Path) -> None:
    file = files.save(uneven.tensors, tmp_path / "bf16.safetensors", torch.bfloat16)
    for options in ({}, {"dtype": torch.float8_e4m3fn}):
        held = load(host, file, **options).model.diffusion_model.state_dict()
        assert all(torch.equal(held[name], uneven.tensors[name]) for name in routing_tensors(uneven.tensors))


@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
def test_saved_and_loaded_it_paints_the_same(host: Comfy, uneven: Capacity, tmp_path: Path, patched: bool) -> None:
    source = files.save(uneven.tensors, tmp_path / "moe.safetensors", torch.bfloat16)
    with torch.inference_mode():
        moe = load(host, source)
        moe = with_lora(moe) if patched else moe
        expected = host.sample(moe)
        saved = save(host, moe)
        assert torch.equal(host.sample(load(host, saved)), expected)
    with TensorFile(saved) as file, TensorFile(source) as original:
        assert file.dtypes == original.dtypes
        assert all(torch.equal(file.tensor(name), original.tensor(name)) for name in routing_tensors(file.shapes))
    assert check_file(saved).router == ROUTER


@pytest.mark.parametrize("factor", [0, 0.5, 3.0])
def test_a_capacity_becomes_the_files_thresholds(host: Comfy, uneven: Capacity, factor: float) -> None:
    with torch.inference_mode():
        moe = under(host, uneven.moe, capacity=factor)
        assert distance(host.sample(load(host, save(host, moe))), host.sample(moe)) <= 1e-5


def test_a_lora_is_what_it_is_on_the_teacher(host: Comfy, pair: Pair, uneven: Capacity) -> None:
    found = host.sample(with_lora(under(host, uneven.moe, capacity=EVERYTHING)))
    assert distance(found, host.sample(with_lora(pair.teacher))) <= 1e-5
    host.unload()

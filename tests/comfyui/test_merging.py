"""Merging of models: right where weights have one order, refused where the result would be noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_model.checkpoint import CheckpointError, check_file
from d2m_model.tensor_file import TensorFile
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair, with_lora
from tests.comfyui.test_saving import load, output, save  # noqa: F401 (fixture)
from tests.toys import files
from tests.toys.compare import distance

SIZE = (1, 8, 8)
DENSE, OTHER = "the other model is dense", "comes of another conversion"


@pytest.fixture(autouse=True)
def as_nodes_run() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def other(host: Comfy, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another conversion of the same teacher."""
    return host.load(files.save(files.split(pair.dense, seed=9), tmp_path_factory.mktemp("other") / "moe.safetensors"))


def merged(host: Comfy, one: Any, two: Any, ratio: float = 0.25) -> Any:
    import comfy_extras.nodes_model_merging as merging

    return merging.ModelMergeSimple().merge(one, two, ratio)[0]


def test_a_merge_with_its_own_lora_is_the_lora_in_part(host: Comfy, pair: Pair) -> None:
    model = merged(host, pair.moe, with_lora(pair.moe))
    expected = host.sample(with_lora(pair.moe, strength=0.8 * 0.75), SIZE, steps=1)
    assert distance(host.sample(model, SIZE, steps=1), expected) <= 1e-5
    saved = save(host, model)
    assert distance(host.sample(load(host, saved), SIZE, steps=1), expected) <= 1e-5
    with TensorFile(saved) as file:
        for name in (name for name in pair.split if name.endswith("neuron_order")):
            assert torch.equal(file.tensor(name), pair.split[name])


@pytest.mark.parametrize(("one", "two", "problem"), [
    ("moe", "dense", DENSE), ("dense", "moe", DENSE), ("moe", "other", OTHER),
])  # fmt: skip
def test_a_merge_of_unequal_orders_is_refused(
    host: Comfy, pair: Pair, other: Any, one: str, two: str, problem: str
) -> None:
    import comfy.hooks

    models = {"moe": pair.moe, "dense": pair.teacher, "other": other}
    with pytest.raises(ValueError, match=f"cannot be merged.*{problem}"):
        merged(host, models[one], models[two])
    weights = comfy.hooks.get_patch_weights_from_model(models[two])
    (hook,) = comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 1.0).hooks
    with pytest.raises(ValueError, match=f"cannot be merged.*{problem}"):
        models[one].clone().add_hook_patches(hook, hook.weights, 1.0)


def test_a_hook_of_the_same_conversion_is_merged(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    import comfy.hooks

    trained = {name: tensor * 1.1 if "linear2.weight" in name else tensor for name, tensor in pair.split.items()}
    model = host.load(files.save(trained, tmp_path / "trained.safetensors"))
    weights = comfy.hooks.get_patch_weights_from_model(model)
    (hook,) = comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 1.0).hooks
    added = pair.moe.clone().add_hook_patches(hook, hook.weights, 1.0)
    assert set(added) == {f"diffusion_model.{name}" for name, _ in pair.moe.model.diffusion_model.named_parameters()}


def test_a_merge_of_no_strength_is_the_first_model(host: Comfy, pair: Pair, other: Any) -> None:
    expected = host.sample(pair.moe, SIZE, steps=1)
    assert torch.equal(host.sample(merged(host, pair.moe, other, ratio=1.0), SIZE, steps=1), expected)


def test_other_directions_of_compressed_modulations_are_refused(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    dense, compressed = files.compressible(pair.dense, 8)
    models = []
    for name, scale in (("one", 1.0), ("two", 2.0)):
        tensors = files.split(
            dense, compressed={**compressed, "adaln_in.weight": compressed["adaln_in.weight"] * scale}
        )
        models.append(host.load(files.save(tensors, tmp_path / f"{name}.safetensors")))
    merged(host, models[0], with_lora(models[0], rank=1))
    with pytest.raises(ValueError, match=f"cannot be merged.*_mod.lin.weight.*{OTHER}"):
        merged(host, *models)


def test_what_could_not_be_loaded_again_is_not_kept(host: Comfy, pair: Pair, output: Path) -> None:  # noqa: F811
    """A patch that another pack puts on what is no weight."""
    model, name = pair.moe.clone(), "single_blocks.0.neuron_order"
    model.add_patches({f"diffusion_model.{name}": ("set", (torch.zeros_like(pair.split[name]),))})
    with pytest.raises(CheckpointError, match=f"kept no file .*{name} is not a permutation"):
        save(host, model)
    assert list((output / "diffusion_models").iterdir()) == []
    check_file(save(host, pair.moe))

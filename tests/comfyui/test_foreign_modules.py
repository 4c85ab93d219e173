"""Save, Convert and the controls where another pack has put modules or tensors of its own into the model."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2m_model.tensor_file import TensorFile
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair, in_teachers_order, lora_for, with_lora
from tests.comfyui.converting import convert, file_of, made, temporary_folder  # noqa: F401 (fixture)
from tests.comfyui.test_saving import load, output, save  # noqa: F401 (fixture)
from tests.toys import files
from tests.toys.compare import distance

SIZE = (1, 8, 8)


@pytest.fixture(autouse=True)
def as_nodes_run() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def packs(host: Comfy) -> ModuleType:
    return importlib.import_module("tests.comfyui.packs")  # which imports ComfyUI


def test_settings_pass_through_a_wrapped_transformer(host: Comfy, pair: Pair, packs: ModuleType) -> None:
    expected = host.sample(host.top_k(pair.moe, 3), SIZE, steps=1)
    with packs.replaced_transformer(pair.moe, packs.Wrapped):
        assert distance(host.sample(host.top_k(pair.moe, 3), SIZE, steps=1), expected) <= 1e-6


@pytest.mark.parametrize("act", [save, convert, lambda _, model: with_lora(model)], ids=["save", "convert", "LoRA"])
def test_a_replaced_transformer_is_named(
    host: Comfy, pair: Pair, packs: ModuleType, act: Callable[[Comfy, Any], object]
) -> None:
    model = pair.teacher if act is convert else pair.moe
    with (
        packs.replaced_transformer(model, packs.Wrapped),
        pytest.raises(ValueError, match=r"was replaced by a Wrapped \(of tests\.comfyui\.packs\).* after"),
    ):
        act(host, model)


def test_a_compiled_clone_is_in_nobodys_way(host: Comfy, pair: Pair) -> None:
    """Compiling nodes exchange the transformer of the MODEL that is loaded, which shares its weights."""
    import comfy.model_management
    import comfy.sd

    def compiled(model: Any) -> Any:
        clone = model.clone()
        clone.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
        comfy.model_management.load_models_gpu([clone])
        assert type(model.model.diffusion_model).__name__ == "OptimizedModule"
        return clone

    lora = lora_for(pair.moe)
    expected = host.sample(comfy.sd.load_lora_for_models(pair.moe, None, lora, 1.0, 0)[0], SIZE, steps=1)
    host.top_k(compiled(pair.moe), 3)
    found = comfy.sd.load_lora_for_models(pair.moe, None, lora, 1.0, 0)[0]
    assert torch.equal(host.sample(found, SIZE, steps=1), expected)
    again = load(host, save(host, compiled(pair.moe)))
    assert torch.equal(host.sample(again, SIZE, steps=1), host.sample(pair.moe, SIZE, steps=1))
    assert convert(host, compiled(pair.teacher), split_only=True).model.moe_config.ffns


@pytest.mark.parametrize("part", ["final_layer", "double_blocks.0.img_attn", "single_blocks.1"])
def test_a_clone_with_a_replaced_module_is_in_nobodys_way(host: Comfy, pair: Pair, part: str) -> None:
    """Object patches of the MODEL that is loaded stay in the transformer that it shares, until another is loaded."""
    import comfy.model_management
    import comfy.sd

    def patched(model: Any) -> None:
        clone = model.clone()
        clone.add_object_patch(f"diffusion_model.{part}", torch.nn.Identity())
        comfy.model_management.load_models_gpu([clone])
        assert isinstance(model.model.diffusion_model.get_submodule(part), torch.nn.Identity)

    lora = lora_for(pair.moe)
    expected = host.sample(comfy.sd.load_lora_for_models(pair.moe, None, lora, 1.0, 0)[0], SIZE, steps=1)
    patched(pair.moe)
    found = comfy.sd.load_lora_for_models(pair.moe, None, lora, 1.0, 0)[0]
    assert torch.equal(host.sample(found, SIZE, steps=1), expected)
    patched(pair.moe)
    again = load(host, save(host, pair.moe))
    assert torch.equal(host.sample(again, SIZE, steps=1), host.sample(pair.moe, SIZE, steps=1))
    patched(pair.teacher)
    converted = convert(host, pair.teacher, split_only=True)
    whole = host.sample(host.top_k(converted, 12), SIZE, steps=1)
    assert distance(whole, host.sample(pair.teacher, SIZE, steps=1)) <= 1e-5


def test_modules_of_others_are_left_out_and_named(
    host: Comfy, pair: Pair, packs: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with packs.added_modules(pair.moe):
        saved = save(host, pair.moe)
    assert "Save FLUX-MoE leaves out face_layers, single_blocks.0.adapter, which other nodes" in caplog.text
    with TensorFile(saved) as file:
        assert set(file.shapes) == set(pair.split)
    with packs.added_modules(pair.teacher):
        converted = convert(host, pair.teacher, split_only=True)
    assert "Convert FLUX to MoE leaves out face_layers, single_blocks.0.adapter, which other nodes" in caplog.text
    with TensorFile(file_of(converted)) as file:
        assert not any("face" in name or "adapter" in name for name in file.shapes)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
def test_gguf_that_is_not_quantised_is_converted(
    host: Comfy, pair: Pair, packs: ModuleType, tmp_path: Path, kind: str, patched: bool
) -> None:
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[kind]
    rounded = {name: tensor.to(dtype).float() if tensor.ndim == 2 else tensor for name, tensor in pair.dense.items()}
    plain, model = (
        host.load(files.save(tensors, tmp_path / f"{index}.safetensors"))
        for index, tensors in enumerate((rounded, pair.dense))
    )
    if patched:
        plain, model = with_lora(plain), with_lora(model)
    found, expected = (
        in_teachers_order(load_file(made(host, it, split_only=True)), pair.dense)
        for it in (packs.as_gguf(model, kind), plain)
    )
    for name, tensor in found.items():
        assert tensor.dtype == (dtype if tensor.ndim == 2 else torch.float32)
        assert distance(tensor.float(), expected[name]) <= (1e-2 if patched else 0)

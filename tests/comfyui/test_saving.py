"""Save FLUX-MoE: what is saved loads again and paints the same, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.checkpoint import check_file
from d2m_model.tensor_file import TensorFile
from demo.in_process import Comfy
from tests.comfyui.conftest import LINEARS, Pair, in_teachers_order, with_lora
from tests.toys import files
from tests.toys.compare import distance

ALL = files.LAYOUT.experts


@pytest.fixture(autouse=True)
def output(host: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder of the test's own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


@pytest.fixture(autouse=True)
def as_nodes_run() -> Iterator[None]:
    with torch.inference_mode():
        yield


def save(host: Comfy, model: Any, prefix: str = "diffusion_models/saved", **hidden: Any) -> Path:
    import folder_paths

    shown = host.execute("D2MSaveFluxMoE", model=model, filename_prefix=prefix, hidden=hidden).ui.as_dict()
    (name,) = shown["text"]
    return Path(folder_paths.get_output_directory()) / name


def load(host: Comfy, file: Path, **options: Any) -> Any:
    return host.module("nodes.files.load_node").load_flux_moe(str(file), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
def test_saved_and_loaded_it_paints_the_same(
    host: Comfy, pair: Pair, tmp_path: Path, dtype: torch.dtype, patched: bool
) -> None:
    moe = load(host, files.save(files.split(pair.dense, mean=True), tmp_path / "moe.safetensors", dtype))
    if patched:
        moe = with_lora(moe)
    expected = host.sample(moe)
    saved = save(host, moe)
    again = load(host, saved)
    assert torch.equal(host.sample(again), expected)
    assert torch.equal(host.sample(moe), expected)
    stored = check_file(saved)
    assert stored.split_only is False
    assert stored.provenance == ({"baked": [{"tensors": len(LINEARS), "strengths": [0.8]}]} if patched else {})
    with TensorFile(saved) as file, TensorFile(tmp_path / "moe.safetensors") as source:
        assert set(file.shapes) == set(source.shapes)
        assert {name: file.dtypes[name] for name in file.dtypes} == source.dtypes
        for name in ("double_blocks.1.img_mlp", "single_blocks.2"):
            for kind in ("neuron_order", "router.weight", "router.bias", "expert_mean"):
                assert torch.equal(file.tensor(f"{name}.{kind}"), source.tensor(f"{name}.{kind}"))


def test_a_saved_split_file_is_still_the_teacher(host: Comfy, pair: Pair) -> None:
    saved = save(host, pair.moe)
    with TensorFile(saved) as file:
        config = check_file(saved)
        assert config.split_only
        tensors = {name: file.tensor(name) for name in file.shapes}
        for name, tensor in in_teachers_order(tensors, pair.dense).items():
            assert torch.equal(tensor, pair.dense[name])
        assert "modelspec.title" in file.metadata
        assert json.loads(file.metadata["d2m_config"]) == json.loads(config.to_json())


def test_without_the_pack_a_baked_file_is_the_teacher_with_its_lora(
    host: Comfy, pair: Pair, request: pytest.FixtureRequest
) -> None:
    saved = save(host, with_lora(pair.moe))
    expected = host.sample(with_lora(pair.teacher))
    with TensorFile(saved) as file:
        assert "as the dense teacher with these patches" in file.metadata["modelspec.description"]
    request.getfixturevalue("without_pack")
    assert distance(host.sample(host.load(saved)), expected) <= 1e-5


def test_top_k_and_gate_become_the_files(host: Comfy, pair: Pair) -> None:
    model = host.top_k(pair.moe, 5, "normalised")
    again = load(host, save(host, model))
    assert torch.equal(host.sample(again), host.sample(model))
    config = again.model.diffusion_model.config
    assert (config.top_k, config.gate.mode, config.split_only) == (5, "normalised", True)


def test_baking_twice_is_noted_twice(host: Comfy, pair: Pair) -> None:
    once = load(host, save(host, with_lora(pair.moe, strength=0.5)))
    config = check_file(save(host, with_lora(once, seed=2)))
    assert [note["strengths"] for note in config.provenance["baked"]] == [[0.5], [0.8]]


def test_a_clone_is_saved_as_it_is_whichever_is_loaded(host: Comfy, pair: Pair) -> None:
    """The weights in memory carry the LoRA of the clone that was sampled last."""
    plain, patched = pair.moe.clone(), with_lora(pair.moe)
    expected = {"plain": host.sample(plain), "patched": host.sample(patched)}
    assert torch.equal(host.sample(load(host, save(host, plain))), expected["plain"])
    host.sample(plain)
    assert torch.equal(host.sample(load(host, save(host, patched))), expected["patched"])


@pytest.mark.parametrize("memory", [1, 6_000_000], ids=["nothing loaded", "partly loaded"])
def test_a_partly_loaded_model_is_saved_whole(host: Comfy, pair: Pair, memory: int) -> None:
    patched = with_lora(pair.moe)
    expected = host.sample(patched)
    host.unload()
    patched.load(torch.device("cpu"), lowvram_model_memory=memory)
    assert patched.model.model_lowvram
    assert bool(patched.backup) == (memory > 1)
    saved = save(host, patched)
    assert torch.equal(host.sample(load(host, saved)), expected)


def test_no_second_copy_of_the_model_is_made(host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """While saving, at most two patched weights that ComfyUI computes are in memory at a time."""
    import weakref

    from comfy.model_patcher import ModelPatcher

    alive: list[weakref.ref] = []
    most, patch = 0, ModelPatcher.patch_weight_to_device

    def counted(self: Any, key: str, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        weight = patch(self, key, *args, **kwargs)
        alive[:] = [it for it in alive if it() is not None] + [weakref.ref(weight)]
        most = max(most, len(alive))
        return weight

    monkeypatch.setattr(ModelPatcher, "patch_weight_to_device", counted)
    save(host, with_lora(pair.moe))
    assert most <= 2


def test_names_are_counted_as_comfyui_counts(host: Comfy, pair: Pair, output: Path) -> None:
    names = [str(save(host, pair.moe, prefix).relative_to(output)) for prefix in ("a/moe", "a/moe", "moe")]
    assert names == ["a/moe_00001_.safetensors", "a/moe_00002_.safetensors", "moe_00001_.safetensors"]


@pytest.mark.parametrize("prefix", ["", ".", "./"])
def test_an_empty_prefix_makes_no_hidden_file(host: Comfy, pair: Pair, output: Path, prefix: str) -> None:
    assert save(host, pair.moe, prefix) == output / "diffusion_models" / "FLUX-MoE_00001_.safetensors"


@pytest.mark.parametrize("disabled", [False, True])
def test_the_workflow_goes_into_the_file_unless_disabled(
    host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_metadata", disabled)
    saved = save(host, pair.moe, PROMPT={"1": {}}, EXTRA_PNGINFO={"workflow": {"nodes": []}})
    with TensorFile(saved) as file:
        found = {name: file.metadata.get(name) for name in ("prompt", "workflow")}
    expected = {"prompt": '{"1": {}}', "workflow": '{"nodes": []}'}
    assert found == (dict.fromkeys(expected) if disabled else expected)


# What is said


def test_another_model_is_refused(host: Comfy, pair: Pair) -> None:
    with pytest.raises(ValueError, match="Save FLUX-MoE works on a FLUX-MoE, but this MODEL is a Flux without experts"):
        save(host, pair.teacher)


@pytest.mark.parametrize(
    ("node_id", "widgets", "said"),
    [
        ("D2MExpertMask", {"mask": "*: 0=0"}, r"FLUX-MoE Expert Mask \(node 7\)"),
        (
            "D2MSchedule",
            {"setting": "top_k", "unit": "percent", "pieces": "0 - 50: 1"},
            r"FLUX-MoE Schedule \(node 7\)",
        ),
        ("D2MReplay", {"log": '[{"evaluation": 0, "top_k": 1}]'}, r"FLUX-MoE Replay \(node 7\)"),
    ],
)
def test_what_no_file_holds_is_refused_and_not_lost(
    host: Comfy, pair: Pair, output: Path, node_id: str, widgets: dict[str, Any], said: str
) -> None:
    model = host.control("D2MTopK", host.control(node_id, pair.moe, node="7", **widgets), top_k=3, gate="sum")
    with pytest.raises(ValueError, match=rf"cannot write {said} to a file.* Bypass these nodes"):
        save(host, model)
    assert list((output / "diffusion_models").iterdir()) == []


def test_controls_that_say_nothing_are_in_no_files_way(host: Comfy, pair: Pair) -> None:
    model = host.control("D2MExpertMask", host.top_k(pair.moe, 5), mask="# nothing yet")
    model = host.control("D2MSchedule", model, setting="top_k", unit="percent", pieces="")
    assert torch.equal(host.sample(load(host, save(host, model))), host.sample(host.top_k(pair.moe, 5)))


def test_a_full_disk_is_said_and_leaves_nothing(
    host: Comfy, pair: Pair, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match=r"the disk is full\. [\d,]+ bytes are needed, 1 are free"):
        save(host, pair.moe)
    assert list((output / "diffusion_models").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(host: Comfy, pair: Pair, output: Path) -> None:
    output.mkdir()
    (output / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"Save FLUX-MoE cannot write to .*taken.*choose another filename_prefix"):
        save(host, pair.moe, "taken/moe")


@pytest.mark.parametrize("prefix", ["a" * 300, "folder/\0", "\ud800", "\x1b[2J"])
def test_a_name_that_no_file_can_have_is_said(host: Comfy, pair: Pair, prefix: str) -> None:
    with pytest.raises(ValueError, match=r"filename_prefix is .*; expected names of up to 200 bytes"):
        save(host, pair.moe, prefix)


def test_an_unwritable_folder_is_said(host: Comfy, pair: Pair, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, whom nothing stops
    with pytest.raises(ValueError, match="this folder cannot be written to"):
        save(host, pair.moe)


def test_a_patch_that_makes_it_no_flux_is_refused(host: Comfy, pair: Pair, output: Path) -> None:
    """A LoRA that lengthens a bias, say: what it patches could not be loaded again."""
    moe = pair.moe.clone()
    longer = torch.zeros(files.DIMS.hidden_size + 1)
    moe.add_patches({"diffusion_model.img_in.bias": ("diff", (longer, {"pad_weight": True}))})
    with pytest.raises(ValueError, match=r"img_in\.bias has shape \[129\]; expected \[128\]"):
        save(host, moe)
    assert list((output / "diffusion_models").iterdir()) == []


def test_a_lora_that_widens_the_input_is_baked(host: Comfy, pair: Pair) -> None:
    """FLUX.1's Depth and Canny LoRAs widen the input."""
    moe, wider = pair.moe.clone(), torch.zeros(files.DIMS.hidden_size, 2 * files.DIMS.in_channels)
    moe.add_patches({"diffusion_model.img_in.weight": ("diff", (wider, {"pad_weight": True}))})
    again = load(host, save(host, moe))
    assert again.model.diffusion_model.config.dims.in_channels == 2 * files.DIMS.in_channels
    assert distance(host.sample(again), host.sample(pair.moe)) <= 1e-5


def test_stopping_leaves_nothing(host: Comfy, pair: Pair, output: Path, interrupted: type[BaseException]) -> None:
    with pytest.raises(interrupted):
        save(host, pair.moe)
    assert list((output / "diffusion_models").iterdir()) == []
    assert save(host, pair.moe).is_file()


@pytest.fixture
def interrupted(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BaseException]]:
    """The user presses Cancel while the tenth tensor is written."""
    import comfy.model_management as management
    import comfy.utils

    calls = 0

    def updated(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", updated)
    yield management.InterruptProcessingException
    management.interrupt_current_processing(False)


def test_what_another_node_injects_is_refused(host: Comfy, pair: Pair) -> None:
    """Such an injection is in no weight, so the file would lack it."""
    from comfy.patcher_extension import PatcherInjection

    injected = pair.moe.clone()
    injected.set_injections("evolved", [PatcherInjection(inject=lambda _: None, eject=lambda _: None)])
    with pytest.raises(ValueError, match=r"Save FLUX-MoE: .*injections: evolved.* would be lost"):
        host.run("D2MSaveFluxMoE", model=injected, filename_prefix="diffusion_models/injected")
    assert not list(host.base.rglob("injected*"))

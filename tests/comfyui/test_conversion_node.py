"""Convert FLUX to MoE: what comes of a loaded dense FLUX, and what is refused."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_model.checkpoint import check_file
from d2m_model.tensor_file import TensorFile
from d2m_train.__main__ import main
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair, in_teachers_order, with_lora
from tests.comfyui.converting import DEEP, convert, deep_flux, file_of, made, prompts, temporary_folder  # noqa: F401
from tests.toys import files
from tests.toys.compare import distance

ALL = files.LAYOUT.experts


# Without data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("options", [(), ("--split-only",), ("--top-k", "4", "--seed", "3")], ids=" ".join)
def test_without_data_it_is_the_file_that_the_command_line_writes(
    host: Comfy, tmp_path: Path, dtype: torch.dtype, options: tuple[str, ...]
) -> None:
    dense = files.save(files.dense_flux(), tmp_path / "dense.safetensors", dtype)
    changes = {"split_only": "--split-only" in options}
    changes |= {"top_k": 4, "seed": 3} if "--top-k" in options else {}
    found = made(host, host.load(dense), **changes)
    assert main(["convert", "--teacher", str(dense), "--out", str(tmp_path / "moe.safetensors"), *options]) == 0
    assert found.read_bytes() == (tmp_path / "moe.safetensors").read_bytes()


@pytest.mark.parametrize("preset", ["M", "S", "XS"])
def test_random_block_routers_are_those_of_the_command_line(host: Comfy, tmp_path: Path, preset: str) -> None:
    dense = files.save(files.dense_flux(DEEP), tmp_path / "dense.safetensors")
    found = made(host, host.load(dense), preset=preset)
    out = tmp_path / "moe.safetensors"
    assert main(["convert", "--teacher", str(dense), "--out", str(out), "--preset", preset]) == 0
    assert found.read_bytes() == out.read_bytes()


def test_a_full_checkpoint_is_converted_too(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    import comfy.sd

    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in pair.dense.items()}
    file = files.save(whole, tmp_path / "checkpoint.safetensors")
    model = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False, output_clip=False)[0]
    found = host.sample(host.top_k(convert(host, model, split_only=True), ALL))
    assert distance(found, host.sample(pair.teacher)) <= 1e-5


def test_split_only_with_all_experts_is_the_dense_model(host: Comfy, pair: Pair) -> None:
    moe = convert(host, pair.teacher, split_only=True)
    assert distance(host.sample(host.top_k(moe, ALL)), host.sample(pair.teacher)) <= 1e-5
    assert distance(host.sample(moe), host.sample(pair.teacher)) > 0.01


# LoRAs, and weights that nobody has a file of


def test_loras_become_part_of_the_weights(host: Comfy, pair: Pair) -> None:
    patched = with_lora(pair.teacher)
    expected = host.sample(patched)
    moe = convert(host, patched, split_only=True)
    assert not moe.patches
    assert distance(host.sample(host.top_k(moe, ALL)), expected) <= 1e-5
    config = check_file(file_of(moe))
    assert config.provenance["baked"][0]["strengths"] == [0.8]
    assert len({config.teacher.sha256, check_file(made(host, pair.teacher)).teacher.sha256}) == 2
    assert distance(host.sample(patched), expected) == 0  # the input is as it was


def test_a_lora_of_a_clone_that_is_still_loaded_is_not_taken_for_the_models_own(host: Comfy, pair: Pair) -> None:
    """ComfyUI leaves it in the weights that they share. The file is finer than these are in memory."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(pair.dense_file), {"dtype": torch.float8_e4m3fn})
    expected = made(host, model)
    with torch.inference_mode():  # as ComfyUI samples
        host.sample(with_lora(model))
    assert made(host, model).read_bytes() == expected.read_bytes()


def test_a_bypass_lora_is_refused_and_gone_with_its_clone(
    host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sd

    with monkeypatch.context() as patch:
        patch.setattr(comfy.sd, "load_lora_for_models", comfy.sd.load_bypass_lora_for_models)
        bypassed = with_lora(pair.teacher)
    assert distance(host.sample(bypassed), host.sample(pair.teacher)) > 0.1
    host.sample(bypassed)  # and it stays loaded
    with pytest.raises(ValueError, match=r"Load LoRA \(Bypass\).*would be lost.*Use Load LoRA"):
        convert(host, bypassed)
    moe = convert(host, pair.teacher, split_only=True)
    assert distance(host.sample(host.top_k(moe, ALL)), host.sample(pair.teacher)) <= 1e-5


def test_what_another_node_injects_is_refused_by_name(host: Comfy, pair: Pair) -> None:
    from comfy.patcher_extension import PatcherInjection

    injected, wrapped = pair.teacher.clone(), pair.teacher.clone()
    injected.set_injections("evolved", [PatcherInjection(inject=lambda _: None, eject=lambda _: None)])
    with pytest.raises(ValueError, match=r"injections: evolved.*would be lost.*Put that node after this one"):
        convert(host, injected)
    wrapped.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight * 0)
    with pytest.raises(ValueError, match=r"weight wrappers: diffusion_model\.img_in\.weight.*would be lost"):
        convert(host, wrapped)


def test_a_model_without_a_file_is_read_from_memory(host: Comfy, pair: Pair) -> None:
    clone = pair.teacher.clone()
    clone.cached_patcher_init = None
    memory, file = made(host, clone), made(host, pair.teacher)
    with TensorFile(memory) as found, TensorFile(file) as expected:
        assert set(found.shapes) == set(expected.shapes)
        for name in set(expected.shapes) - {"d2m_config"}:
            assert torch.equal(found.tensor(name), expected.tensor(name)), name


def test_weights_that_were_changed_since_they_were_loaded_are_those_that_count(
    host: Comfy, pair: Pair, tmp_path: Path
) -> None:
    """And a file that was replaced by another is not taken for the model."""
    file = files.save(pair.dense, tmp_path / "dense.safetensors")
    model = host.load(file)
    files.save(files.dense_flux(seed=7), file)
    found = made(host, model, split_only=True)
    with TensorFile(found) as opened:
        tensors = {name: opened.tensor(name) for name in opened.shapes}
        for name, tensor in in_teachers_order(tensors, pair.dense).items():
            assert torch.equal(tensor, pair.dense[name]), name


def test_a_model_in_float8_stays_in_float8(host: Comfy, pair: Pair) -> None:
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(pair.dense_file), {"dtype": torch.float8_e4m3fn})
    moe = convert(host, model)
    assert moe.model.diffusion_model.single_blocks[0].linear1.weight.dtype == torch.float8_e4m3fn
    assert host.sample(moe).isfinite().all()


# What the MODEL carries


def test_it_keeps_the_patch_of_model_sampling(host: Comfy, pair: Pair) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    (model,) = ModelSamplingFlux().patch(pair.teacher, max_shift=3.0, base_shift=0.5, width=512, height=512)
    moe = convert(host, model, split_only=True)
    found = host.sample(host.top_k(moe, ALL))
    assert distance(found, host.sample(model)) <= 1e-5
    assert distance(found, host.sample(pair.teacher)) > 0.01


def test_hooks_on_guidance_go_with_it_and_patches_of_the_dense_blocks_do_not(host: Comfy, pair: Pair) -> None:
    model = pair.teacher.clone()
    model.set_model_sampler_post_cfg_function(lambda given: given["denoised"] * 0)
    model.set_model_attn1_patch(lambda *_, **__: 1 / 0)
    moe = convert(host, model)
    assert host.sample(moe).std() < 1e-5


def test_it_can_be_saved_and_loaded(host: Comfy, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    moe = host.top_k(convert(host, pair.teacher), 5)
    (name,) = host.execute("D2MSaveFluxMoE", model=moe, filename_prefix="moe").ui.as_dict()["text"]
    again = host.load(tmp_path / "output" / name)
    assert torch.equal(host.sample(again), host.sample(moe))


def test_the_file_goes_with_the_last_model_that_uses_it(host: Comfy, pair: Pair) -> None:
    moe = convert(host, pair.teacher)
    file, clone = file_of(moe), host.top_k(moe, 3)
    expected = host.sample(clone)
    del moe
    gc.collect()
    assert file.exists()
    assert torch.equal(host.sample(clone), expected)
    del clone
    host.unload()
    gc.collect()
    assert not file.exists()


# What is refused, and stopping


@pytest.fixture
def interrupted(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BaseException]]:
    """The user presses Cancel a little after the bar has moved to `at` percent."""
    import comfy.model_management as management
    import comfy.utils

    def updated(self: Any, value: float, *args: Any, **kwargs: Any) -> None:
        if value >= interrupted_at[0]:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", updated)
    yield management.InterruptProcessingException
    management.interrupt_current_processing(False)


interrupted_at = [0]


@pytest.mark.parametrize("at", [10, 60], ids=["while calibrating", "while writing"])
def test_stopping_leaves_nothing(
    host: Comfy, pair: Pair, temporary: Path, interrupted: type[BaseException], at: int
) -> None:
    interrupted_at[0] = at
    with pytest.raises(interrupted):
        convert(host, pair.teacher, calibration=prompts(host, pair.teacher))
    assert list(temporary.iterdir()) == []
    flux = pair.teacher.model.diffusion_model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in flux.modules())


def test_a_full_disk_is_said_before_anything_is_done(
    host: Comfy, pair: Pair, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match=r"[\d,]+ bytes are needed, 1 are free.*--temp-directory"):
        convert(host, pair.teacher, calibration=prompts(host, pair.teacher))
    assert list(temporary.iterdir()) == []


def test_a_full_disk_is_said_with_what_earlier_conversions_hold(
    host: Comfy, pair: Pair, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> str:
        gc.collect()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
            with pytest.raises(ValueError, match="1 are free") as error:
                convert(host, pair.teacher)
        return str(error.value)

    host.unload()
    assert "earlier" not in refused()
    held = [convert(host, pair.teacher, seed=seed) for seed in range(2)]
    size = sum(file_of(moe).stat().st_size for moe in held)
    assert f"2 earlier conversions that ComfyUI still holds take {size:,} bytes" in refused()
    assert "Unload Models and Execution Cache" in refused()
    held.pop()
    assert f"1 earlier conversion that ComfyUI still holds takes {size // 2:,} bytes" in refused()


def test_a_flux_moe_is_refused(host: Comfy, pair: Pair) -> None:
    with pytest.raises(ValueError, match="is a FLUX-MoE already"):
        convert(host, pair.moe)


def test_another_architecture_is_refused(host: Comfy, pair: Pair) -> None:
    class PixArt:
        diffusion_model = torch.nn.Linear(1, 1)

    other = pair.teacher.clone()
    other.model = PixArt()
    with pytest.raises(ValueError, match=r"works on a dense FLUX\.1 .*this MODEL is a PixArt"):
        convert(host, other)


def test_what_is_almost_a_flux_is_refused(host: Comfy, pair: Pair) -> None:
    model = host.load(pair.dense_file)
    model.model.diffusion_model.txt_norm = torch.nn.LayerNorm(files.DIMS.context_size)
    with pytest.raises(ValueError, match=r"cannot be converted.*variant of it, with txt_norm\.bias"):
        convert(host, model)
    del model.model.diffusion_model.single_blocks[-1].linear2
    with pytest.raises(ValueError, match=r"cannot be converted.*single_blocks\.2\.linear2\.weight is missing"):
        convert(host, model)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "int8_tensorwise", "GGUF"])
def test_quantised_weights_that_cannot_be_reordered_are_refused(host: Comfy, tmp_path: Path, kind: str) -> None:
    from comfy.quant_ops import QUANT_ALGOS

    dense = files.dense_flux()
    if kind == "GGUF" or kind not in QUANT_ALGOS:  # what its loader leaves in the layers
        model = host.load(files.save(dense, tmp_path / "dense.safetensors"))
        layer, packed = model.model.diffusion_model.single_blocks[0].linear1, torch.zeros(7, 72, dtype=torch.uint8)
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    else:
        from safetensors.torch import save_file

        from tests.comfyui.test_quantised import quantise

        stored, _ = quantise(dense, kind)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "dense.safetensors")
        model = host.load(tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match=r"this FLUX is quantised .*bfloat16, float16 or float8"):
        convert(host, model)


def test_float8_with_scales_is_what_the_command_line_makes_of_it(host: Comfy, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tests.comfyui.test_quantised import quantise

    stored, _ = quantise(files.dense_flux(), "float8_e4m3fn")
    dense, out = tmp_path / "dense.safetensors", tmp_path / "moe.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, dense)
    model = host.load(dense)
    found = made(host, model)
    assert main(["convert", "--teacher", str(dense), "--out", str(out)]) == 0
    assert found.read_bytes() == out.read_bytes()
    model.cached_patcher_init = None  # out of memory: the same weights
    with TensorFile(made(host, model)) as memory, TensorFile(out) as expected:
        for name in ("single_blocks.0.linear1.weight", "double_blocks.1.txt_mlp.2.weight"):
            assert memory.dtypes[name] == torch.bfloat16
            assert torch.equal(memory.tensor(name), expected.tensor(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preset": "M", "block_routers": "fitted to the prompts"},
            "Connect calibration prompts .*choose preset L, or set",
        ),
        (
            {"router": "capacity"},
            "capacity routers have to be fitted .*Connect calibration prompts, or choose router top_k",
        ),
        ({"preset": "XS"}, "Preset XS needs"),
        ({"calibration": []}, "calibration prompts are empty"),
    ],
)
def test_options_that_cannot_be_met_say_what_to_do(
    host: Comfy, pair: Pair, temporary: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(host, pair.teacher, **changes)
    assert not temporary.exists() or list(temporary.iterdir()) == []


def test_too_few_evaluations_for_block_routers_are_refused(host: Comfy, deep: Any) -> None:
    with pytest.raises(
        ValueError, match=r"8 evaluations of the model or more to be fitted; these are 3 \(1 samples of 3 steps\)"
    ):
        convert(
            host, deep, preset="M", samples=1, calibration=prompts(host, deep, 1), block_routers="fitted to the prompts"
        )

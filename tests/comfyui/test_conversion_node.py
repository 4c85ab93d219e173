"""Convert FLUX to MoE: what comes of a loaded dense FLUX, and what is refused."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_model.checkpoint import check_file
from d2m_model.tensor_file import TensorFile
from d2m_train.__main__ import main
from tests.comfyui import files
from tests.comfyui.conftest import Pair, in_teachers_order, with_lora
from tests.comfyui.inside import Comfy, distance
from tools.host import ROOT

RANDOM = "random"
GIVEN = {
    "preset": "L", "split_only": False, "samples": 4, "steps": 3, "size": 128, "seed": 0, "top_k": 2, "router": "top_k",
    "block_routers": RANDOM,
}  # fmt: skip
DEEP = replace(files.DIMS, double_blocks=4, single_blocks=6)  # room for a group of each kind
ALL = files.LAYOUT.experts


@pytest.fixture(autouse=True)
def temporary(host: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "temp"


def convert(host: Comfy, model: Any, **changes: Any) -> Any:
    return host.run("D2MConvertFlux", model=model, **{**GIVEN, **changes})


def file_of(converted: Any) -> Path:
    """That it is mapped from, and that goes with it."""
    _, (file, *_) = converted.cached_patcher_init
    return Path(file.path)


def made(host: Comfy, model: Any, **changes: Any) -> Path:
    """The file alone."""
    import folder_paths

    moe = convert(host, model, **changes)
    folder = Path(folder_paths.get_temp_directory()).parent
    return Path(shutil.copyfile(file_of(moe), folder / f"copied-{file_of(moe).name}"))


def prompts(host: Comfy, model: Any, count: int = 3) -> list:
    """As Conditioning (Combine) joins them."""
    return [entry for seed in range(count) for entry in host.conditioning(model, 10 + seed)]


@pytest.fixture(scope="session")
def deep(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return host.load(files.save(files.dense_flux(DEEP), tmp_path_factory.mktemp("deep") / "deep.safetensors"))


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


# Calibration


def test_calibrated_it_is_nearer_to_the_dense_model(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emoji FLUX, of which there is something to know; painted from words that it was not calibrated with."""
    monkeypatch.setattr(host.module("nodes.calibration"), "TOKENS", 1024)

    def words(*texts: str) -> list:
        return [entry for text in texts for entry in host.run("D2MEmojiPrompt", text=text, guidance=3.5)]

    def paint(model: Any) -> torch.Tensor:
        import comfy.sample

        given, noise = (
            words("fox in the centre on blue"),
            torch.randn(1, 16, 16, 16, generator=generator.manual_seed(1)),
        )
        return comfy.sample.sample(
            model, noise, 6, 1.0, "euler", "simple", given, given, torch.zeros_like(noise), disable_pbar=True, seed=1
        )

    generator, teacher = torch.Generator(), host.load(ROOT / "demo" / "assets" / "emoji-flux.safetensors")
    asked = words(
        "cat left on red", "apple in the centre on green", "rocket above on yellow", "house right on white",
        "dog below on blue", "sun in the centre on red", "tree left on yellow", "car right on green",
    )  # fmt: skip
    expected = paint(teacher)
    without = distance(paint(convert(host, teacher)), expected)
    calibrated = distance(paint(convert(host, teacher, calibration=asked, samples=8, steps=4)), expected)
    assert calibrated < 0.75 * without


def test_it_is_told_by_seed_and_prompts_alone(host: Comfy, pair: Pair) -> None:
    asked = {"calibration": prompts(host, pair.teacher)}
    one, same = (made(host, pair.teacher, **asked) for _ in range(2))
    assert one.read_bytes() == same.read_bytes()
    other = made(host, pair.teacher, **asked, seed=1)
    assert check_file(other).provenance["seed"] == 1


def test_every_prompt_counts_combined_or_in_a_batch(host: Comfy, pair: Pair) -> None:
    calibration = host.module("nodes.calibration")
    combined = prompts(host, pair.teacher, 3)
    text = torch.cat([entry[0] for entry in combined])
    pooled = torch.cat([entry[1]["pooled_output"] for entry in combined])
    batch = [[text, {**combined[0][1], "pooled_output": pooled}]]
    for one, other in zip(calibration.prompts_of(combined), calibration.prompts_of(batch), strict=True):
        assert torch.equal(one[0][0], other[0][0])
        assert torch.equal(one[0][1]["pooled_output"], other[0][1]["pooled_output"])


def test_calibration_leaves_nothing_on_the_model(host: Comfy, pair: Pair, temporary: Path) -> None:
    before = host.sample(pair.teacher)
    moe = convert(host, pair.teacher, calibration=prompts(host, pair.teacher))
    flux = pair.teacher.model.diffusion_model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in flux.modules())
    assert torch.equal(host.sample(pair.teacher), before)
    assert list(temporary.iterdir()) == [file_of(moe)]  # no parts of a calibration


def test_what_is_recorded_is_what_the_blocks_saw(host: Comfy, deep: Any, tmp_path: Path) -> None:
    """A group's means, vectors and changes, and an FFN's inputs, against hooks of our own."""
    from d2m_model.config import FluxMoEConfig

    config: FluxMoEConfig = check_file(made(host, deep, preset="XS"))
    calibration, flux = host.module("nodes.calibration"), deep.model.diffusion_model
    (double, single), seen = config.groups, []
    block = flux.get_submodule(f"single_blocks.{single.first + 1}")
    inputs: list[torch.Tensor] = []
    ours = [
        block.register_forward_pre_hook(lambda _, given: seen.append([given[0].clone()])),
        block.register_forward_hook(lambda _, given, found: seen[-1].append(found.clone())),
        block.linear1.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1).clone())),
    ]
    settings = calibration.CalibrationSettings(samples=2, steps=4, size=64, seed=0)
    with torch.inference_mode():
        found = calibration.calibrate(
            deep, config, calibration.prompts_of(prompts(host, deep, 2)), settings, tmp_path, lambda: None
        )
    for handle in ours:
        handle.remove()
    group = found.group(single)
    text = host.conditioning(deep, 1)[0][0].shape[1]
    expected = torch.stack([(new - old)[:, text:].square().mean().sqrt() for old, new in seen])
    torch.testing.assert_close(group.change_nM[:, 1], expected)
    assert group.x_mean_nH.shape == group.vec_nH.shape == (8, 128)
    assert found.group(double).change_nM.shape == (8, 3)
    rows = {tuple(row.tolist()) for row in torch.cat(inputs)}
    assert {tuple(row.tolist()) for row in found.inputs(f"single_blocks.{single.first + 1}")} <= rows


def test_conditioning_vectors_are_the_models_own_under_any_timestep_and_guidance(
    host: Comfy, pair: Pair, tmp_path: Path
) -> None:
    from comfy.ldm.flux.layers import timestep_embedding

    config, calibration = check_file(made(host, pair.teacher)), host.module("nodes.calibration")
    asked, flux = prompts(host, pair.teacher, 2), pair.teacher.model.diffusion_model
    settings = calibration.CalibrationSettings(samples=40, steps=1, size=64, seed=0)
    with torch.inference_mode():
        found = calibration.calibrate(
            pair.teacher, config, calibration.prompts_of(asked), settings, tmp_path, lambda: None
        )
        generator = torch.Generator().manual_seed(9)
        pooled = torch.cat([entry[1]["pooled_output"] for entry in asked]).repeat(2000, 1)
        t, guidance = torch.rand(4000, generator=generator), 1.5 + 3.5 * torch.rand(4000, generator=generator)
        vec = flux.time_in(timestep_embedding(t, 256)) + flux.guidance_in(timestep_embedding(guidance, 256))
        expected = torch.nn.functional.silu(vec + flux.vector_in(pooled)).double()
        found.few = False  # whose moments are widened
        moments = found.moments()
        assert float((moments.mean_H - expected.mean(0)).norm() / expected.mean(0).norm()) < 0.05
        assert float(moments.covariance_HH.trace()) == pytest.approx(float(torch.cov(expected.T).trace()), rel=0.1)


@pytest.mark.parametrize("preset", ["M", "XS"])
def test_block_routers_are_fitted(host: Comfy, deep: Any, preset: str) -> None:
    moe = convert(host, deep, preset=preset, calibration=prompts(host, deep), block_routers="fitted to the prompts")
    config = moe.model.diffusion_model.config
    assert config.provenance["block_router"] == "ridge"
    assert len(config.groups) == {"M": 1, "XS": 2}[preset]
    assert host.sample(moe).isfinite().all()


def test_capacity_routers_are_fitted(host: Comfy, pair: Pair) -> None:
    moe = convert(host, pair.teacher, router="capacity", calibration=prompts(host, pair.teacher))
    assert moe.model.diffusion_model.config.capacity_router.capacity == 2
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
            "Connect calibration prompts .*take preset L, or set",
        ),
        ({"router": "capacity"}, "capacity routers are fitted .*Connect calibration prompts, or take router top_k"),
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
    with pytest.raises(ValueError, match=r"8 evaluations of the model or more; these are 3 \(1 samples of 3 steps\)"):
        convert(
            host, deep, preset="M", samples=1, calibration=prompts(host, deep), block_routers="fitted to the prompts"
        )

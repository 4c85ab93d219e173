"""Convert FLUX to MoE with calibration prompts: what is asked of the dense model, and what it is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_model.checkpoint import check_file
from demo.dataset import EMOJI_TEACHER
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.converting import convert, deep_flux, file_of, made, prompts, temporary_folder  # noqa: F401
from tests.toys.compare import distance


@pytest.fixture
def quick_fits(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit experts and predictors in few steps, for tests in which their quality does not matter."""
    coactivation = host.module("d2m_model.conversion.coactivation")
    monkeypatch.setattr(coactivation, "ORACLE_STEPS", 1)
    monkeypatch.setattr(coactivation, "MOST_STEPS", 2)
    monkeypatch.setattr(host.module("d2m_model.routers.capacity_fit"), "STEPS", 20)


def test_calibrated_it_is_nearer_to_the_dense_model(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emoji FLUX, of which there is something to know; painted from words that it was not calibrated with."""
    monkeypatch.setattr(host.module("nodes.files.calibration"), "TOKENS_PER_FFN", 1024)

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

    generator, teacher = torch.Generator(), host.load(EMOJI_TEACHER)
    asked = words(
        "cat left on red", "apple in the centre on green", "rocket above on yellow", "house right on white",
        "dog below on blue", "sun in the centre on red", "tree left on yellow", "car right on green",
    )  # fmt: skip
    expected = paint(teacher)
    without = distance(paint(convert(host, teacher)), expected)
    calibrated = distance(paint(convert(host, teacher, calibration=asked, samples=8, steps=4)), expected)
    assert calibrated < 0.75 * without


@pytest.mark.usefixtures("quick_fits")
def test_it_is_told_by_seed_and_prompts_alone(host: Comfy, pair: Pair) -> None:
    asked = {"calibration": prompts(host, pair.teacher)}
    one, same = (made(host, pair.teacher, **asked) for _ in range(2))
    assert one.read_bytes() == same.read_bytes()
    other = made(host, pair.teacher, **asked, seed=1)
    assert check_file(other).provenance["seed"] == 1


def test_every_prompt_counts_combined_or_in_a_batch(host: Comfy, pair: Pair) -> None:
    calibration = host.module("nodes.files.calibration")
    combined = prompts(host, pair.teacher, 3)
    text = torch.cat([entry[0] for entry in combined])
    pooled = torch.cat([entry[1]["pooled_output"] for entry in combined])
    batch = [[text, {**combined[0][1], "pooled_output": pooled}]]
    for one, other in zip(calibration.split_prompts(combined), calibration.split_prompts(batch), strict=True):
        assert torch.equal(one[0][0], other[0][0])
        assert torch.equal(one[0][1]["pooled_output"], other[0][1]["pooled_output"])


@pytest.mark.usefixtures("quick_fits")
def test_no_prompt_is_left_out(host: Comfy, pair: Pair) -> None:
    data = check_file(made(host, pair.teacher, calibration=prompts(host, pair.teacher, 6))).provenance["data"]
    assert data == {"name": "6 prompts in ComfyUI", "samples": 6, "steps": 3}


@pytest.mark.usefixtures("quick_fits")
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
    calibration, flux = host.module("nodes.files.calibration"), deep.model.diffusion_model
    (double, single), seen = config.groups, []
    block = flux.get_submodule(f"single_blocks.{single.first + 1}")
    inputs: list[torch.Tensor] = []
    ours = [
        block.register_forward_pre_hook(lambda _, given: seen.append([given[0].clone()])),
        block.register_forward_hook(lambda _, given, found: seen[-1].append(found.clone())),
        block.linear1.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1).clone())),
    ]
    settings = calibration.CalibrationSamples(samples=2, steps=4, size=64, seed=0)
    with torch.inference_mode():
        found = calibration.calibrate_on_prompts(
            deep, config, calibration.split_prompts(prompts(host, deep, 2)), settings, tmp_path, lambda: None
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

    config, calibration = check_file(made(host, pair.teacher)), host.module("nodes.files.calibration")
    asked, flux = prompts(host, pair.teacher, 2), pair.teacher.model.diffusion_model
    settings = calibration.CalibrationSamples(samples=40, steps=1, size=64, seed=0)
    with torch.inference_mode():
        found = calibration.calibrate_on_prompts(
            pair.teacher, config, calibration.split_prompts(asked), settings, tmp_path, lambda: None
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


@pytest.mark.usefixtures("quick_fits")
@pytest.mark.parametrize("preset", ["M", "XS"])
def test_block_routers_are_fitted(host: Comfy, deep: Any, preset: str) -> None:
    moe = convert(host, deep, preset=preset, calibration=prompts(host, deep), block_routers="fitted to the prompts")
    config = moe.model.diffusion_model.config
    assert config.provenance["block_router"] == "ridge"
    assert len(config.groups) == {"M": 1, "XS": 2}[preset]
    assert host.sample(moe).isfinite().all()


@pytest.mark.usefixtures("quick_fits")
def test_capacity_routers_are_fitted(host: Comfy, pair: Pair) -> None:
    moe = convert(host, pair.teacher, router="capacity", calibration=prompts(host, pair.teacher))
    assert moe.model.diffusion_model.config.router.capacity == 2
    assert host.sample(moe).isfinite().all()

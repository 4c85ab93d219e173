"""FLUX users' workflows, run with ComfyUI's own nodes, give with a FLUX-MoE what they should.

Three references: the dense teacher (all experts, all blocks), a stock FLUX made to follow the paper's equations
literally (some experts), and the file without groups whose skipped blocks are left out by patches_replace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from demo.in_process import Comfy
from tests.comfyui import grouped
from tests.comfyui.grouped import DOUBLES, GROUPS, SINGLES, active
from tests.comfyui.test_sampling import route_literally
from tests.comfyui.workflows import SAMPLE_BY_SAMPLE, WORKFLOWS, Studio, channels, empty_latent
from tests.toys import files
from tests.toys.compare import distance

ALL = files.LAYOUT.experts
TOP_K = 2


@pytest.fixture(scope="module")
def studio(host: Comfy) -> Studio:
    return Studio(host)


@dataclass
class Family:
    """A dense teacher, a stock FLUX that sends its tokens to TOP_K experts, and the FLUX-MoE."""

    teacher: Any
    literal: Any
    moe: Any


@pytest.fixture(scope="module")
def family(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Family]:
    import comfy.supported_models as supported

    @functools.cache
    def made(in_channels: int) -> Family:
        folder, dims = tmp_path_factory.mktemp("family"), replace(files.DIMS, in_channels=in_channels)
        dense = files.dense_flux(dims)
        split = files.split(dense, dims)
        file = files.save(split, folder / "moe.safetensors")
        with pytest.MonkeyPatch.context() as without_pack:
            stock = [entry for entry in supported.models if not entry.__module__.startswith(host.pack_name)]
            without_pack.setattr(supported, "models", stock)
            literal = host.load(file)
        assert type(literal.model.diffusion_model).__name__ == "Flux"
        route_literally(literal.model.diffusion_model, split, TOP_K, "sum")
        return Family(host.load(files.save(dense, folder / "dense.safetensors")), literal, host.load(file))

    return made


@dataclass
class Skipping:
    """A FLUX-MoE with block groups, and the same weights without."""

    moe: Any
    plain: Any


@pytest.fixture(scope="module")
def skipping(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Skipping]:
    @functools.cache
    def made(in_channels: int) -> Skipping:
        folder, dims = tmp_path_factory.mktemp("skipping"), replace(grouped.DIMS, in_channels=in_channels)
        dense = files.dense_flux(dims)
        with_groups = files.split(dense, dims, groups=GROUPS, seed=grouped.SEED)
        moe = host.load(files.save(with_groups, folder / "grouped.safetensors"))
        plain = files.split(dense, dims, seed=grouped.SEED)
        return Skipping(moe, host.load(files.save(plain, folder / "plain.safetensors")))

    return made


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_paints_what_the_teacher_and_the_equations_paint(
    host: Comfy, studio: Studio, family: Callable[[int], Family], name: str
) -> None:
    it, workflow, latent = family(channels(name)), WORKFLOWS[name], empty_latent(2)
    everything = workflow(studio, host.top_k(it.moe, ALL), latent)
    assert distance(everything, workflow(studio, it.teacher, latent)) <= 1e-5
    some = workflow(studio, host.top_k(it.moe, TOP_K), latent)
    assert distance(some, workflow(studio, it.literal, latent)) <= 1e-5
    assert distance(some, everything) >= 1e-3
    if name != "CFG" and channels(name) == 64:  # the workflow does something
        assert distance(some, WORKFLOWS["CFG"](studio, host.top_k(it.moe, TOP_K), latent)) >= 1e-4


@pytest.mark.parametrize("name", WORKFLOWS)
def test_with_all_blocks_skipped_a_workflow_paints_what_the_others_paint(
    host: Comfy, studio: Studio, skipping: Callable[[int], Skipping], name: str
) -> None:
    """ControlNets' residuals of a skipped block land where the block would have been."""
    it, workflow, latent = skipping(channels(name)), WORKFLOWS[name], empty_latent(2)
    without = it.plain.clone()
    for kind, group in (("double_block", DOUBLES), ("single_block", SINGLES)):
        for i in range(group.first, group.first + group.blocks):
            without.set_model_patch_replace(lambda args, extra: args, "dit", kind, i)
    found = workflow(studio, active(host, it.moe, 0), latent)
    assert distance(found, workflow(studio, without, latent)) <= 1e-6
    everything = workflow(studio, active(host, it.moe, [3, 5]), latent)
    assert distance(everything, workflow(studio, it.plain, latent)) <= 1e-6
    assert distance(found, everything) >= 1e-3


@pytest.mark.parametrize("name", SAMPLE_BY_SAMPLE)
def test_a_batch_is_its_images_one_at_a_time(
    host: Comfy, studio: Studio, skipping: Callable[[int], Skipping], watched: list, name: str
) -> None:
    """The images choose different blocks, some of them also for prompt and negative prompt."""
    it, workflow, latent = skipping(channels(name)), WORKFLOWS[name], empty_latent(4)
    differently = 0
    for blocks in ([1, 2], [2, 3]):
        moe = active(host, it.moe, blocks)
        watched.clear()
        together = workflow(studio, moe, latent)
        differently += sum(len(samples) % 4 > 0 for choice in watched for samples in choice)
        for i in (0, 3):
            one = {"samples": latent["samples"][i : i + 1], "batch_index": [i]}
            assert distance(together[i : i + 1], workflow(studio, moe, one)) <= 1e-5
    assert differently

"""Block groups with what ComfyUI and other packs do to a model: ControlNets, patches, low VRAM, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.grouped import (
    BATCH,
    DEVICE,
    DIMS,
    DOUBLES,
    GROUPS,
    SINGLES,
    Grouped,
    active,
    evaluate,
    inputs,
)
from tests.toys.compare import distance

# ControlNets and patches


@pytest.mark.parametrize(("kind", "index"), [("input", 1), ("input", 2), ("input", 3), ("output", 2), ("output", 5)])
def test_a_controlnets_residual_of_a_skipped_block_lands_at_its_block(
    host: Comfy, grouped: Grouped, loaded: Callable[[Any], Any], kind: str, index: int
) -> None:
    """The result is that of a file without groups in which all blocks of the group are left out."""
    without = grouped.plain.clone()
    for name, group in (("double_block", DOUBLES), ("single_block", SINGLES)):
        for i in range(group.first, group.first + group.blocks):
            without.set_model_patch_replace(lambda args, extra: args, "dit", name, i)
    residual = torch.randn(4, 16, 128, generator=torch.Generator().manual_seed(7))
    control: dict[str, list[Tensor | None]] = {"input": [None] * 4, "output": [None] * 6}
    control[kind][index] = residual
    batch = inputs(4)
    found = evaluate(loaded(active(host, grouped.moe, 0)), *batch, control=control)
    expected = evaluate(loaded(without), *batch, control=control)
    assert torch.equal(found, expected)
    assert distance(found, evaluate(without, *batch)) >= 1e-2


def test_controlnets_see_every_sample_at_every_block(
    host: Comfy, grouped: Grouped, loaded: Callable[[Any], Any]
) -> None:
    """Some of the samples run a block, all of them have its residual."""
    generator = torch.Generator().manual_seed(8)
    control = {
        kind: [torch.randn(4, 16, 128, generator=generator) for _ in range(depth)]
        for kind, depth in (("input", DIMS.double_blocks), ("output", DIMS.single_blocks))
    }
    moe, batch = loaded(grouped.moe), inputs(4)
    found = evaluate(moe, *batch, control=control)
    for i in range(4):
        of_sample = {kind: [residual[i : i + 1] for residual in control[kind]] for kind in control}
        alone = evaluate(moe, *(it[i : i + 1] for it in batch), control=of_sample)
        assert distance(found[i : i + 1], alone) <= 1e-5


def test_block_patches_of_other_packs_are_called_for_every_block(host: Comfy, grouped: Grouped) -> None:
    """Chosen or not, with the whole batch, at its stock index."""
    expected, seen = host.sample(grouped.moe, BATCH, steps=1), []

    def through(args: dict, extra: dict) -> dict:
        seen.append((args["transformer_options"]["block_index"], args["img"].shape[0], args["vec"].shape[0]))
        return extra["original_block"](args)

    patched = grouped.moe.clone()
    for kind, depth in (("double_block", DIMS.double_blocks), ("single_block", DIMS.single_blocks)):
        for i in range(depth):
            patched.set_model_patch_replace(through, "dit", kind, i)
    assert torch.equal(host.sample(patched, BATCH, steps=1), expected)
    assert seen == [(i, 4, 4) for i in (*range(DIMS.double_blocks), *range(DIMS.single_blocks))]


@pytest.mark.parametrize("position", [0, 1])
def test_a_pack_may_put_its_own_block_in_place_of_a_grouped_one(
    host: Comfy, grouped: Grouped, watched: list, position: int
) -> None:
    """The others of the group keep to one choice; where it is the first that is left out, to the one that it would have
    made."""
    expected = host.sample(grouped.moe, BATCH, steps=1)
    choices = list(watched)
    watched.clear()
    without = grouped.moe.clone()
    without.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", DOUBLES.first + position)
    found = host.sample(without, BATCH, steps=1)
    assert len(watched) == len(GROUPS)
    assert watched[0] == choices[0]
    for i in range(BATCH[0]):  # who did not choose this block does not miss it
        assert (distance(found[i], expected[i]) >= 1e-3) == (i in choices[0][position])


@pytest.mark.parametrize("patched", [range(DIMS.single_blocks), [4]], ids=["every block", "one of a group"])
def test_a_pack_may_run_a_block_on_parts_of_the_batch(
    grouped: Grouped, loaded: Callable[[Any], Any], patched: Sequence[int]
) -> None:
    """However it deals the samples out, no sample follows the choice of another."""

    def dealt(*parts: list[int]) -> Tensor:
        def run(args: dict, extra: dict) -> dict:
            out = torch.empty_like(args["img"])
            for part in parts:
                of_part = {key: args[key][part] for key in ("img", "vec", "pe")}
                out[part] = extra["original_block"]({**args, **of_part})["img"]
            return {"img": out}

        model = grouped.moe.clone()
        for i in patched:
            model.set_model_patch_replace(run, "dit", "single_block", i)
        return evaluate(loaded(model), *inputs(4))

    expected = dealt([0], [1], [2], [3])
    assert distance(dealt([0, 1], [2, 3]), expected) <= 1e-5
    assert distance(dealt([2, 0], [3, 1]), expected) <= 1e-5


def test_blocks_run_without_transformer_options(grouped: Grouped, loaded: Callable[[Any], Any]) -> None:
    """Packs that bring a loop of their own over the blocks may not hand them on."""
    flux = loaded(grouped.moe).model.diffusion_model
    block = flux.double_blocks[1]
    img, txt, vec = torch.randn(4, 16, 128), torch.randn(4, 7, 128), torch.randn(4, 128)
    pe = flux.pe_embedder(torch.zeros(4, 23, 3))
    with torch.inference_mode():
        bare = block(img.clone(), txt.clone(), vec, pe)
        given = block(img=img.clone(), txt=txt.clone(), vec=vec, pe=pe, attn_mask=None, transformer_options={})
        single = flux.single_blocks[2](img.clone(), vec, flux.pe_embedder(torch.zeros(4, 16, 3)))
    assert all(torch.equal(a, b) for a, b in zip(bare, given, strict=True))
    assert single.shape == img.shape


def test_attention_patches_see_the_whole_batch(host: Comfy, grouped: Grouped) -> None:
    """Patches may tell prompts from negative prompts by their position in the batch."""
    seen = []

    def halved(q: Tensor, k: Tensor, v: Tensor, extra_options: dict, **rest: Any) -> dict:
        seen.append((extra_options["block_type"], extra_options["block_index"], q.shape[0]))
        factor = torch.linspace(0.5, 1.0, q.shape[0])[:, None, None, None]
        return {"q": q * factor}

    moe, plain = grouped.moe.clone(), grouped.plain.clone()
    for model in (moe, plain):
        model.set_model_attn1_patch(halved)
    host.sample(plain, BATCH, steps=1)
    everywhere, _ = set(seen), seen.clear()
    found = host.sample(moe, BATCH, steps=1)
    assert set(seen) <= everywhere
    assert {batch for *_, batch in seen} == {4}
    assert distance(found, host.sample(grouped.moe, BATCH, steps=1)) >= 1e-3


def test_a_patched_attention_does_not_change_what_is_skipped(host: Comfy, grouped: Grouped) -> None:
    """The whole batch is shown to the patch, but a sample is changed only by blocks that it chose."""
    expected = host.sample(grouped.moe, BATCH)
    looking = grouped.moe.clone()
    looking.set_model_attn1_patch(lambda q, k, v, **rest: {"q": q})
    assert distance(host.sample(looking, BATCH), expected) <= 1e-5


# Memory


def test_low_vram_casts_the_routers_too(host: Comfy, grouped: Grouped, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ops

    host.unload()
    cast, returned = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight
    casts: list[Any] = []
    returns: list[Any] = []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, *a, **k: (casts.append(s), cast(s, *a, **k))[1])
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda s, *a: (returns.append(s), returned(s, *a))[1])
    moe, found = grouped.moe.clone(), []
    for memory in (1, 1e32):
        moe.load(DEVICE, lowvram_model_memory=memory, full_load=memory > 1)
        casts.clear()
        returns.clear()
        found.append(evaluate(moe, *inputs(4)))
        moe.unpatch_model(DEVICE)
        for group in moe.model.diffusion_model.block_groups:
            for router in (group.router_x, group.router_y):
                assert casts.count(router) == returns.count(router) == 1
    assert torch.equal(*found)


def test_nothing_of_a_run_stays_on_the_model(host: Comfy, grouped: Grouped) -> None:
    def state(module: Any) -> dict[str, Any]:
        return {name: set(vars(part)) for name, part in module.named_modules()}

    flux = grouped.moe.model.diffusion_model
    host.sample(grouped.moe, steps=1)
    before, options = state(flux), dict(grouped.moe.model_options["transformer_options"])
    host.sample(grouped.moe, BATCH, steps=1)
    assert state(flux) == before
    assert grouped.moe.model_options["transformer_options"] == options


# torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[Any]:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


def test_blocks_compiled_one_by_one_follow_every_setting(host: Comfy, grouped: Grouped, fresh_compiler: Any) -> None:
    """Some packs compile this way, with the guards of TorchCompileModel."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    compiled = grouped.moe.clone()
    keys = [f"diffusion_model.double_blocks.{i}" for i in (1, 2, 3)]
    options: Any = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(compiled, backend="eager", options=options, keys=keys)
    for settings in ({}, {"active_blocks": 3}, {"top_k": 4}):
        models = [host.with_settings(model, **settings) for model in (grouped.moe, compiled)]
        eager, found = (host.sample(model, (1, 8, 8), steps=1) for model in models)
        assert distance(found, eager) <= 1e-6

"""Files with block groups (Mixture of Blocks) in ComfyUI, against the file without groups and a literal reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.checkpoint import check_file
from d2m_model.config import BlockGroup
from d2m_model.tensor_file import TensorFile
from tests.comfyui import files
from tests.comfyui.conftest import with_lora
from tests.comfyui.inside import Comfy, distance
from tests.comfyui.test_saving import load, output, save  # noqa: F401 (fixture)

DEVICE = torch.device("cpu")
DIMS = replace(files.DIMS, double_blocks=4, single_blocks=6)
DOUBLES = BlockGroup(kind="double", first=1, blocks=3, active=1, selection="topk")
SINGLES = BlockGroup(kind="single", first=1, blocks=5, active=2, selection="topk")
GROUPS = (DOUBLES, SINGLES)  # as of preset S
BATCH = (4, 8, 8)
SEED = 7  # of routers by which samples choose differently, in BATCH and in `inputs`


@dataclass
class Grouped:
    """A FLUX-MoE with block groups and the same weights without: tensors, the file, MODELs."""

    tensors: dict[str, Tensor]
    file: Path
    moe: Any
    plain: Any
    teacher: Any


@pytest.fixture(scope="module")
def grouped(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Grouped:
    folder = tmp_path_factory.mktemp("grouped")
    dense = files.dense_flux(DIMS)
    tensors = files.split(dense, DIMS, groups=GROUPS, seed=SEED)
    file = files.save(tensors, folder / "grouped.safetensors")
    plain = host.load(files.save(files.split(dense, DIMS, seed=SEED), folder / "plain.safetensors"))
    return Grouped(tensors, file, host.load(file), plain, host.load(files.save(dense, folder / "dense.safetensors")))


@pytest.fixture
def watched(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """What was chosen since: of every choice, for each block of the group, the samples that run it."""
    block_groups, seen = host.module("nodes.block_groups"), []
    samples_of = block_groups.samples_of

    def watching(routing: Any) -> Any:
        seen.append([column.nonzero().flatten().tolist() for column in routing.chosen_BM.T])
        return samples_of(routing)

    monkeypatch.setattr(block_groups, "samples_of", watching)
    return seen


def active(host: Comfy, model: Any, blocks: int | list[int]) -> Any:
    return host.module("nodes.controls").with_settings(model, active_blocks=blocks)


def with_groups(host: Comfy, grouped: Grouped, folder: Path, *groups: BlockGroup) -> Any:
    """The same weights and routers, other words in the file."""
    config = check_file(grouped.file)
    tensors = dict(grouped.tensors)
    tensors["d2m_config"] = files.config_tensor(replace(config, groups=groups).to_json())
    return host.load(files.save(tensors, folder / "others.safetensors"))


def evaluate(model: Any, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, **rest: Any) -> Tensor:
    """One evaluation of a batch, each sample with its own latent, timestep and prompt."""
    with torch.inference_mode():
        return model.model.apply_model(
            x, t, c_crossattn=context, y=pooled, guidance=torch.full_like(t, 3.5),
            transformer_options=model.model_options["transformer_options"], **rest,
        )  # fmt: skip


def inputs(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, context, pooled = (
        torch.randn(batch, *shape, generator=generator) for shape in ((16, 8, 8), (7, DIMS.context_size), (32,))
    )
    return x, torch.linspace(0.1, 0.9, batch), context, pooled


@pytest.fixture
def loaded() -> Iterator[Callable[[Any], Any]]:
    """Loads a MODEL for apply_model, until the end of the test."""
    models: list[Any] = []

    def load_it(model: Any) -> Any:
        model.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
        models.append(model)
        return model

    yield load_it
    for model in models:
        model.unpatch_model(DEVICE)


# What runs


def test_all_blocks_active_paint_what_the_file_without_groups_paints(host: Comfy, grouped: Grouped) -> None:
    expected = host.sample(grouped.plain, BATCH)
    assert torch.equal(host.sample(active(host, grouped.moe, [3, 5]), BATCH), expected)
    assert distance(host.sample(grouped.moe, BATCH), expected) >= 1e-2


def test_all_blocks_and_all_experts_paint_what_the_teacher_paints(host: Comfy, grouped: Grouped) -> None:
    everything = host.top_k(active(host, grouped.moe, 5), files.LAYOUT.experts)
    assert distance(host.sample(everything), host.sample(grouped.teacher)) <= 1e-5


def test_no_block_active_paints_what_the_other_blocks_paint(host: Comfy, grouped: Grouped) -> None:
    without = grouped.plain.clone()
    for kind, group in (("double_block", DOUBLES), ("single_block", SINGLES)):
        for i in range(group.first, group.first + group.blocks):
            without.set_model_patch_replace(lambda args, extra: args, "dit", kind, i)
    assert torch.equal(host.sample(active(host, grouped.moe, 0), BATCH), host.sample(without, BATCH))


@pytest.mark.parametrize("selection", ["topk", "window"])
@pytest.mark.parametrize("blocks", [[1, 1], [2, 3]])
def test_chosen_blocks_follow_the_paper(
    host: Comfy, grouped: Grouped, tmp_path: Path, loaded: Callable[[Any], Any], selection: Any, blocks: list[int]
) -> None:
    """Eq. 4-5, in float64, one sample at a time, on the file without groups: blocks not chosen are left out."""
    groups = [replace(group, selection=selection) for group in GROUPS]
    moe = loaded(active(host, with_groups(host, grouped, tmp_path, *groups), blocks))
    x, t, context, pooled = inputs(4)
    found, reference = evaluate(moe, x, t, context, pooled), grouped.plain.clone()
    choices: dict[str, set[int]] = {}
    seen = set()

    def chosen(weights: list[Tensor], streams: list[Tensor], vec: Tensor, count: int) -> set[int]:
        mean = torch.cat(streams, dim=1).double().mean(dim=1)[0]
        logits = 0.5 * weights[0].double() @ mean + 0.5 * weights[1].double() @ vec[0].double()
        if selection == "topk":
            return set(logits.topk(count).indices.tolist())
        sums = [float(logits[i : i + count].sum()) for i in range(len(logits) - count + 1)]
        first = sums.index(max(sums))
        return set(range(first, first + count))

    def through(kind: str, index: int, position: int) -> Callable[[dict, dict], dict]:
        def replaced(args: dict, extra: dict) -> dict:
            if position == 0:
                weights = [grouped.tensors[f"block_groups.{index}.router_{which}.weight"] for which in "xy"]
                streams = [args["img"], *([args["txt"]] if kind == "double" else [])]
                choices[kind] = chosen(weights, streams, args["vec"], blocks[index])
                seen.add((kind, *choices[kind]))
            return extra["original_block"](args) if position in choices[kind] else args

        return replaced

    for index, group in enumerate(groups):
        for position in range(group.blocks):
            patch = through(group.kind, index, position)
            reference.set_model_patch_replace(patch, "dit", f"{group.kind}_block", group.first + position)
    loaded(reference)
    expected = torch.cat([evaluate(reference, *(it[i : i + 1] for it in (x, t, context, pooled))) for i in range(4)])
    assert distance(found, expected) <= 1e-5
    assert len(seen) >= 3  # samples choose differently


def test_a_batch_of_different_choices_is_its_samples_one_at_a_time(
    host: Comfy, grouped: Grouped, loaded: Callable[[Any], Any], watched: list
) -> None:
    """With the vec, pe and attention mask of each."""
    moe = loaded(active(host, grouped.moe, [1, 2]))
    batch = inputs(4)
    mask = torch.zeros(4, 1, 1, 7 + 16)
    for i in range(4):
        mask[i, ..., i] = float("-inf")  # another word of the prompt hidden from each
    together = evaluate(moe, *batch, attention_mask=mask)
    assert len(watched) == len(GROUPS)
    assert all(0 < len(samples) < 4 for samples in watched[0] if samples)  # of the double blocks
    alone = [evaluate(moe, *(it[i : i + 1] for it in batch), attention_mask=mask[i : i + 1]) for i in range(4)]
    assert distance(together, torch.cat(alone)) <= 1e-5
    assert distance(together, evaluate(moe, *batch)) >= 1e-3


def test_prompts_and_negative_prompts_choose_for_themselves(host: Comfy, grouped: Grouped, watched: list) -> None:
    found = host.sample(grouped.moe, (2, 8, 8), cfg=3.0, steps=2)
    assert len(watched) == 2 * len(GROUPS)  # cond and uncond in one batch of four
    apart = grouped.moe.clone()
    apart.set_model_unet_function_wrapper(
        lambda apply, args: torch.cat(
            [
                apply(
                    args["input"][i : i + 1],
                    args["timestep"][i : i + 1],
                    **{
                        key: value[i : i + 1] if isinstance(value, Tensor) else value
                        for key, value in args["c"].items()
                    },
                )
                for i in range(args["input"].shape[0])
            ]
        )
    )
    assert distance(host.sample(apart, (2, 8, 8), cfg=3.0, steps=2), found) <= 1e-5


def test_one_choice_serves_every_block_of_a_group(
    host: Comfy, grouped: Grouped, monkeypatch: pytest.MonkeyPatch, watched: list
) -> None:
    """Every sample runs just as many blocks as are active, and nothing else runs."""
    blocks, runs = host.module("nodes.blocks"), []
    for name in ("DoubleExpertBlock", "SingleExpertBlock"):
        cls = getattr(blocks, name)

        def run(self: Any, choice: Any, run: Any = cls.run, **kwargs: Any) -> Any:
            runs.append((id(self), kwargs["vec"].shape[0]))
            return run(self, choice, **kwargs)

        monkeypatch.setattr(cls, "run", run)
    host.sample(grouped.moe, BATCH, steps=1)
    flux = grouped.moe.model.diffusion_model
    of_group = {
        id(block): group.kind
        for group, blocks_of in zip(GROUPS, (flux.double_blocks, flux.single_blocks), strict=True)
        for block in blocks_of[group.first : group.first + group.blocks]
    }
    ran = {kind: sum(batch for block, batch in runs if of_group.get(block) == kind) for kind in ("double", "single")}
    assert ran == {"double": 4 * 1, "single": 4 * 2}
    assert len(watched) == len(GROUPS)


def test_dense_blocks_can_be_grouped_too(host: Comfy, tmp_path: Path) -> None:
    dense = files.dense_flux(DIMS)
    group = replace(DOUBLES, first=0)  # its first block stays dense
    some = files.split(dense, DIMS, groups=(group,))
    config = replace(check_file(files.save(some, tmp_path / "some.safetensors")))
    layouts = {name: layout for name, layout in config.ffns.items() if not name.startswith("single_blocks.")}
    kept = {
        name: tensor
        for name, tensor in some.items()
        if not (name.startswith("single_blocks.") and name.endswith(("neuron_order", "router.weight", "router.bias")))
    }
    config = replace(config, ffns=layouts, groups=(group, SINGLES))
    kept |= {f"block_groups.1.router_{which}.weight": torch.randn(5, 128) for which in "xy"}
    kept["d2m_config"] = files.config_tensor(config.to_json())
    moe = host.load(files.save(kept, tmp_path / "dense_blocks.safetensors"))
    kept["d2m_config"] = files.config_tensor(replace(config, groups=()).to_json())
    plain = {name: tensor for name, tensor in kept.items() if not name.startswith("block_groups.")}
    expected = host.sample(host.load(files.save(plain, tmp_path / "plain.safetensors")), BATCH)
    assert torch.equal(host.sample(active(host, moe, 5), BATCH), expected)
    assert distance(host.sample(moe, BATCH), expected) >= 1e-2


# Settings


def test_clones_with_different_active_blocks_do_not_disturb_each_other(host: Comfy, grouped: Grouped) -> None:
    settings: list[Any] = [0, 1, [2, 4], 5]
    models = [grouped.moe, *(active(host, grouped.moe, setting) for setting in settings)]
    first = [host.sample(model) for model in models]
    again = [host.sample(model) for model in models[::-1]][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(latents.flatten().tolist()) for latents in first}) == len(models)
    assert "d2m" not in grouped.moe.model_options["transformer_options"]


def test_one_number_is_for_every_group_and_a_list_for_each(host: Comfy, grouped: Grouped) -> None:
    for one, each in ((1, [1, 1]), (2, [2, 2]), (4, [3, 4]), (5, [3, 5])):
        assert torch.equal(
            host.sample(active(host, grouped.moe, one), steps=1),
            host.sample(active(host, grouped.moe, each), steps=1),
        )
    own = host.sample(active(host, grouped.moe, [1, 2]), steps=1)
    assert torch.equal(own, host.sample(grouped.moe, steps=1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (6, r"active_blocks is 6; expected 0 to 5, the blocks of the largest group"),
        (-1, r"active_blocks is -1; expected 0 to 5"),
        ([1], r"active_blocks is \[1\]; expected one number, or a list of 2, one for each block group"),
        ([4, 1], r"active_blocks\[0\] is 4; expected 0 to 3, the blocks of block group 0 \(double blocks 1 to 3\)"),
        (
            [1, 1.5],
            r"active_blocks\[1\] is 1\.5; expected 0 to 5, the blocks of block group 1 \(single blocks 1 to 5\)",
        ),
        ("all", r"active_blocks is 'all'; expected one number, or a list of 2"),
    ],
)
def test_a_wrong_number_of_active_blocks_is_said(host: Comfy, grouped: Grouped, setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host.sample(active(host, grouped.moe, setting), steps=1)


# The host's features


class Control:
    """A ControlNet that adds to the output of one block, or of all."""

    def __init__(self, residuals: dict[str, list[Tensor | None]]) -> None:
        self.residuals = residuals

    def get_control(self, x: Tensor, *args: Any) -> dict[str, list[Tensor | None]]:
        return self.residuals

    def cleanup(self) -> None: ...

    def get_models(self) -> list:
        return []

    def pre_run(self, *args: Any) -> None: ...

    previous_controlnet = None
    extra_conds: tuple = ()
    extra_concat = None


@pytest.mark.parametrize(("kind", "index"), [("input", 1), ("input", 2), ("input", 3), ("output", 2), ("output", 5)])
def test_a_controlnets_residual_of_a_skipped_block_lands_at_its_block(
    host: Comfy, grouped: Grouped, loaded: Callable[[Any], Any], kind: str, index: int
) -> None:
    """As on the file without groups whose blocks of the group are all left out."""
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
    expected_choices = (host.sample(grouped.moe, BATCH, steps=1), list(watched))[1]
    watched.clear()
    skipped, doubled = grouped.moe.clone(), grouped.moe.clone()
    index = DOUBLES.first + position
    skipped.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", index)
    found = host.sample(skipped, BATCH, steps=1)
    assert len(watched) == len(GROUPS)
    assert watched[0] == expected_choices[0]
    # As if this block were never chosen.
    doubled.set_model_patch_replace(
        lambda args, extra: {"img": args["img"] * 1.0, "txt": args["txt"] * 1.0}, "dit", "double_block", index
    )
    assert torch.equal(host.sample(doubled, BATCH, steps=1), found)


def test_a_pack_may_run_a_block_on_parts_of_the_batch(
    host: Comfy, grouped: Grouped, loaded: Callable[[Any], Any]
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
        for i in range(DIMS.single_blocks):
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
    """They may tell prompts from negative prompts by their place in it. Results are as if each sample ran alone."""
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


def test_routers_keep_their_files_precision(host: Comfy, grouped: Grouped, tmp_path: Path) -> None:
    file = files.save(grouped.tensors, tmp_path / "bf16.safetensors", torch.bfloat16)
    for options in ({}, {"dtype": torch.float8_e4m3fn}):
        flux = load(host, file, **options).model.diffusion_model
        for index, group in enumerate(flux.block_groups):
            for which in ("router_x", "router_y"):
                stored = grouped.tensors[f"block_groups.{index}.{which}.weight"]
                assert torch.equal(getattr(group, which).weight, stored)


def test_names_are_the_files(grouped: Grouped) -> None:
    flux = grouped.moe.model.diffusion_model
    assert {name.replace("_norm.weight", "_norm.scale") for name in flux.state_dict()} == set(grouped.tensors)


@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
def test_saved_and_loaded_it_paints_the_same(host: Comfy, grouped: Grouped, tmp_path: Path, patched: bool) -> None:
    source = files.save(grouped.tensors, tmp_path / "moe.safetensors", torch.bfloat16)
    with torch.inference_mode():
        moe = load(host, source)
        moe = with_lora(moe) if patched else moe
        expected = host.sample(moe, BATCH)
        saved = save(host, moe)
        assert torch.equal(host.sample(load(host, saved), BATCH), expected)
    with TensorFile(saved) as file, TensorFile(source) as original:
        assert file.dtypes == original.dtypes
        for name in (name for name in file.shapes if name.startswith("block_groups.")):
            assert torch.equal(file.tensor(name), original.tensor(name))
    assert check_file(saved).groups == GROUPS


def test_active_blocks_become_the_files(host: Comfy, grouped: Grouped) -> None:
    with torch.inference_mode():
        saved = save(host, active(host, grouped.moe, [2, 4]))
        found = host.sample(load(host, saved), BATCH)
    assert [group.active for group in check_file(saved).groups] == [2, 4]
    assert torch.equal(found, host.sample(active(host, grouped.moe, [2, 4]), BATCH))


def test_a_lora_is_what_it_is_without_groups(host: Comfy, grouped: Grouped) -> None:
    found = host.sample(with_lora(active(host, grouped.moe, 5)))
    expected = host.sample(with_lora(grouped.plain))
    host.unload()
    assert torch.equal(found, expected)


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


def test_a_compiled_model_follows_every_setting(host: Comfy, tmp_path: Path, fresh_compiler: Any) -> None:
    """The choice stands outside of all graphs, which are therefore the same for any number of active blocks."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    dims = replace(files.DIMS, double_blocks=3, single_blocks=1)  # quick to trace
    tensors = files.split(files.dense_flux(dims), dims, groups=(replace(DOUBLES, first=0),), seed=SEED)
    moe = host.load(files.save(tensors, tmp_path / "moe.safetensors"))
    whole = TorchCompileModel.execute(moe, "eager").result[0]  # its own backends need a C++ compiler

    def check(size: int, **settings: Any) -> None:
        models = [host.module("nodes.controls").with_settings(model, **settings) for model in (moe, whole)]
        eager, compiled = (host.sample(model, (size, 8, 8), steps=1) for model in models)
        assert distance(compiled, eager) <= 1e-6

    for size in (1, 4):
        check(size, active_blocks=3)
        check(size)
    graphs, breaks = fresh_compiler["stats"]["unique_graphs"], sum(fresh_compiler["graph_break"].values())
    assert breaks <= 8
    for setting in (0, 2, 3, 1, [2]):
        for size in (1, 4):
            check(size, active_blocks=setting)
    assert fresh_compiler["stats"]["unique_graphs"] == graphs
    assert sum(fresh_compiler["graph_break"].values()) == breaks
    for settings in ({"top_k": 3}, {"gate": "normalised", "active_blocks": 2}, {}):
        check(1, **settings)
    assert fresh_compiler["stats"]["unique_graphs"] <= graphs + 2 * 3  # dense block's, MoE blocks' of both kinds


def test_blocks_compiled_one_by_one_follow_every_setting(host: Comfy, grouped: Grouped, fresh_compiler: Any) -> None:
    """As some packs do, with the guards of TorchCompileModel."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    compiled = grouped.moe.clone()
    keys = [f"diffusion_model.double_blocks.{i}" for i in (1, 2, 3)]
    options: Any = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(compiled, backend="eager", options=options, keys=keys)
    for settings in ({}, {"active_blocks": 3}, {"top_k": 4}):
        models = [host.module("nodes.controls").with_settings(model, **settings) for model in (grouped.moe, compiled)]
        eager, found = (host.sample(model, (1, 8, 8), steps=1) for model in models)
        assert distance(found, eager) <= 1e-6

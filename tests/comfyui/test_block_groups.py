"""Files with block groups (Mixture of Blocks) in ComfyUI, against the file without groups and a literal reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.checkpoint import check_file
from d2m_model.tensor_file import TensorFile
from demo.in_process import Comfy
from tests.comfyui.conftest import with_lora
from tests.comfyui.grouped import (
    BATCH,
    DIMS,
    DOUBLES,
    GROUPS,
    SINGLES,
    Grouped,
    active,
    evaluate,
    inputs,
    with_groups,
)
from tests.comfyui.test_saving import load, save
from tests.toys import files
from tests.toys.compare import distance

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
    """Each sample has its own vec, pe and attention mask."""
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
    blocks, runs = host.module("nodes.model.blocks"), []
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


def test_top_k_of_a_file_without_experts_is_refused(host: Comfy, tmp_path: Path) -> None:
    tensors = {
        **files.dense_flux(DIMS),
        **{f"block_groups.0.router_{which}.weight": torch.ones(3, 128) for which in "xy"},
    }
    split = files.split(files.dense_flux(DIMS), DIMS, groups=(DOUBLES,))
    config = replace(check_file(files.save(split, tmp_path / "split.safetensors")), ffns={})
    tensors["d2m_config"] = files.config_tensor(config.to_json())
    moe = host.load(files.save(tensors, tmp_path / "dense.safetensors"))
    with pytest.raises(ValueError, match="Top-K has no effect on this FLUX-MoE, which has block groups and no experts"):
        host.top_k(moe, 2)


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
        host.sample(host.with_settings(grouped.moe, active_blocks=setting), steps=1)


# The file


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

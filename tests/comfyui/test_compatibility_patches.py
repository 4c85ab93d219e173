"""Patches of other packs are called as on a dense FLUX: as often, in the same places, with the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import Grouped, active
from tests.toys import files
from tests.toys.compare import distance

SIZE = (2, 8, 8)
Record = list[Any]

# Only for us, or ours to say.
OURS = {"d2m", "d2m_graph", "d2m_chosen"}


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items() if key not in OURS and key != "wrappers"}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return value if isinstance(value, int | str | None) else type(value).__name__


def wrapper(kind: str) -> Callable[[Any, Record], None]:
    def install(model: Any, record: Record) -> None:
        def wrapped(executor: Any, *args: Any, **kwargs: Any) -> Any:
            if kind in ("apply_model", "diffusion_model"):  # of the others some are told of the model itself
                record.append((kind, described(args), described(kwargs)))
            else:
                record.append((kind, len(args), sorted(kwargs)))
            found = executor(*args, **kwargs)
            if isinstance(found, Tensor):
                record.append(tuple(found.shape))
                return found * 0.9
            return found

        model.add_wrapper_with_key(kind, "of another pack", wrapped)

    return install


def attention_patch(name: str) -> Callable[[Any, Record], None]:
    def install(model: Any, record: Record) -> None:
        def look(
            q: Tensor, k: Tensor, v: Tensor, pe: Any = None, attn_mask: Any = None, extra_options: Any = None
        ) -> Any:
            options = extra_options or {}
            record.append((name, *map(described, (q, k, v)), options.get("block_type"), options.get("block_index")))
            return {"q": q * 0.9, "k": k, "v": v, "pe": pe, "attn_mask": attn_mask}

        model.set_model_attn1_patch(look)

    return install


def attention_override(model: Any, record: Record) -> None:
    def override(attention: Any, *args: Any, **kwargs: Any) -> Tensor:
        record.append(("attention", described(args[:3])))
        found: Tensor = attention(*args, **kwargs)
        return found * 0.9

    options = model.model_options["transformer_options"] = dict(model.model_options.get("transformer_options", {}))
    options["optimized_attention_override"] = override


def output_patch(model: Any, record: Record) -> None:
    def look(out: Tensor, extra_options: dict[str, Any]) -> Tensor:
        record.append(("output", described(out), extra_options["block_index"], extra_options.get("img_slice")))
        return out * 0.9

    model.set_model_attn1_output_patch(look)


def post_input(model: Any, record: Record) -> None:
    def look(args: dict[str, Any]) -> dict[str, Any]:
        record.append(("post_input", described({key: args[key] for key in ("img", "txt", "img_ids", "txt_ids")})))
        return {**args, "img": args["img"] * 0.9}

    model.set_model_post_input_patch(look)


def block_replacements(model: Any, record: Record) -> None:
    def through(args: dict, extra: dict) -> dict:
        record.append(("block", described(args)))
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 0.9}

    flux = model.model.diffusion_model
    for kind, blocks in (("double_block", flux.double_blocks), ("single_block", flux.single_blocks)):
        for i in range(len(blocks)):
            model.set_model_patch_replace(through, "dit", kind, i)


def unet_function(model: Any, record: Record) -> None:
    def wrapped(apply: Any, args: dict[str, Any]) -> Tensor:
        record.append(("unet", described(args["input"]), described(args["timestep"]), sorted(args["c"])))
        found: Tensor = apply(args["input"], args["timestep"], **args["c"])
        return found * 0.9

    model.set_model_unet_function_wrapper(wrapped)


def cfg_functions(model: Any, record: Record) -> None:
    model.set_model_sampler_pre_cfg_function(lambda args: [it * 0.9 for it in args["conds_out"]])
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.95)

    def combined(args: dict[str, Any]) -> Tensor:
        record.append(("cfg", described(args["cond"]), described(args["uncond"])))
        found: Tensor = args["uncond"] + (args["cond"] - args["uncond"]) * 2
        return found

    model.set_model_sampler_cfg_function(combined)


def object_patch(model: Any, record: Record) -> None:
    """A module of the model exchanged for the time of a run."""
    layer = model.model.diffusion_model.final_layer

    class Halved(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            record.append(("final layer", described(args)))
            found: Tensor = layer(*args, **kwargs)
            return found * 0.9

    model.add_object_patch("diffusion_model.final_layer", Halved())


PATCHES: dict[str, Callable[[Any, Record], None]] = {
    **{
        f"wrapper {kind}": wrapper(kind)
        for kind in (
            "outer_sample", "sampler_sample", "predict_noise", "calc_cond_batch", "apply_model", "diffusion_model",
        )
    },
    "attn1_patch": attention_patch("attention"),
    "attn1_output_patch": output_patch,
    "optimized_attention_override": attention_override,
    "post_input patch": post_input,
    "patches_replace": block_replacements,
    "unet_function_wrapper": unet_function,
    "cfg functions": cfg_functions,
    "object patch": object_patch,
}  # fmt: skip


def under(host: Comfy, model: Any, install: Callable[[Any, Record], None]) -> tuple[Tensor, Record]:
    clone, record = model.clone(), []
    install(clone, record)
    return host.sample(clone, SIZE, cfg=3.0, steps=2), record


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_called_and_heard_as_on_a_dense_flux(host: Comfy, pair: Pair, name: str) -> None:
    moe = host.top_k(pair.moe, files.LAYOUT.experts)
    expected, asked = under(host, pair.teacher, PATCHES[name])
    found, heard = under(host, moe, PATCHES[name])
    assert asked
    assert heard == asked
    assert distance(found, expected) <= 1e-5
    if name not in ("wrapper outer_sample", "wrapper sampler_sample", "wrapper calc_cond_batch"):
        assert distance(found, host.sample(moe, SIZE, cfg=3.0, steps=2)) >= 1e-4


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_called_and_heard_with_block_groups(host: Comfy, grouped: Grouped, name: str) -> None:
    """All blocks active: as on the file without groups. Some: no more often, and with the whole batch."""
    expected, asked = under(host, grouped.plain, PATCHES[name])
    found, heard = under(host, active(host, grouped.moe, [3, 5]), PATCHES[name])
    assert heard == asked
    assert distance(found, expected) <= 1e-6
    _, some = under(host, grouped.moe, PATCHES[name])
    assert some
    assert all(call in asked for call in some)


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_controls_wrapper_and_another_packs_are_both_called(host: Comfy, pair: Pair, top_k: int) -> None:
    """Whatever the order in which they were put on."""
    record: Record = []
    before = pair.moe.clone()
    wrapper("predict_noise")(before, record)
    one = host.sample(host.top_k(before, top_k), SIZE, cfg=3.0, steps=2)
    after = host.top_k(pair.moe, top_k).clone()
    wrapper("predict_noise")(after, record)
    two = host.sample(after, SIZE, cfg=3.0, steps=2)
    assert torch.equal(one, two)
    assert len(record) == 2 * 2 * 2  # models, steps, call and answer
    assert distance(one, host.sample(host.top_k(pair.moe, top_k), SIZE, cfg=3.0, steps=2)) >= 1e-4

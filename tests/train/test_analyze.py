"""`python -m d2m_train analyze`: the figures open, and their numbers are the models'."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from d2m_model.hosts.diffusers import load_transformer, state_dict_to_bfl
from d2m_model.hosts.diffusers.tensors import save_flux_moe
from d2m_model.mob import BlockRouting
from d2m_train.__main__ import main
from d2m_train.data.emoji import EmojiData
from d2m_train.distillation.features import block_outputs
from d2m_train.evaluation.prompts import EMOJI_SHIFT, read_prompts
from d2m_train.flow.sampling import noise_for, sample
from demo.dataset import COLOURS
from tests.toys.students import DIMS, LAYOUT, dense_flux, student

FEW = ("--data", "emoji", "--every", "60", "--steps", "2", "--batch", "4")  # 9 prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense.safetensors, moe.safetensors (top-k routers and a block group), capacity.safetensors."""
    folder = tmp_path_factory.mktemp("files")
    save_file(state_dict_to_bfl(dense_flux()), folder / "dense.safetensors")
    for name, model in (("moe", student()), ("capacity", student(capacity=True, groups=False))):
        save_flux_moe(model, model.flux_moe, folder / f"{name}.safetensors")
    return folder


def analyze(folder: Path, what: str, file: str, *options: object) -> dict[str, Any]:
    arguments = ["analyze", folder / file, "--what", what, *FEW, "--out", folder / what, *options]
    assert main([str(argument) for argument in arguments]) == 0
    found: dict[str, Any] = json.loads((folder / what / f"{what}.json").read_text())
    return found


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), int)


def test_figure_3_is_the_mean_square_change_of_every_block(folder: Path) -> None:
    numbers = analyze(folder, "blocks", "dense.safetensors")
    names = [*(f"double_blocks.{i}" for i in range(3)), *(f"single_blocks.{i}" for i in range(3))]
    assert numbers["blocks"] == names
    by_prompt, by_timestep = np.array(numbers["by_prompt"]), np.array(numbers["by_timestep"])
    assert by_prompt.shape == (9, 6)
    assert by_timestep.shape == (2, 6)
    np.testing.assert_allclose(by_prompt.mean(0), numbers["mean"])
    np.testing.assert_allclose(by_timestep.mean(0), numbers["mean"])
    model, data = load_transformer(folder / "dense.safetensors", torch.float32), EmojiData()
    prompts = read_prompts("emoji", 60)
    assert numbers["prompts"] == [prompt.text for prompt in prompts]
    batch = data.batch(0, 9, 0)
    texts = data.encode_prompts(numbers["prompts"])
    batch.context_BLD, batch.pooled_BV, batch.guidance_B = texts.context_BLD, texts.pooled_BV, torch.full((9,), 3.5)
    noise = noise_for([prompt.index for prompt in prompts], batch.image_ids_T3, DIMS.in_channels)
    with block_outputs(model, names[3:]) as outputs:
        sample(model, batch, noise, steps=2, mu=EMOJI_SHIFT)
    for place in (4, 5):  # of the first step: a single block's input is the output of the one before
        change = (outputs[names[place]] - outputs[names[place - 1]]).square().mean()
        assert by_timestep[0, place] == pytest.approx(float(change), rel=1e-3)
    assert pixels(folder / "blocks" / "blocks.png").std() > 10


def test_figure_6_counts_the_experts_of_prompts_timesteps_and_tokens(folder: Path) -> None:
    numbers = analyze(folder, "experts", "moe.safetensors")
    assert list(numbers["layers"]) == ["double_blocks.2.img_mlp", "single_blocks.2"], "the last, as there is no fifth"
    assert numbers["text_tokens"] == {"double_blocks.2.img_mlp": 0, "single_blocks.2": 12}
    for name, tokens in (("double_blocks.2.img_mlp", 64), ("single_blocks.2", 12 + 64)):
        maps = {what: np.array(of, float) for what, of in numbers["layers"][name].items()}
        rows = {"prompt": 9, "timestep": 2, "token": tokens}
        assert {what: of.shape for what, of in maps.items()} == {w: (n, LAYOUT.experts) for w, n in rows.items()}
        for of in maps.values():
            ran = ~np.isnan(of).any(1)
            assert ran.any()
            np.testing.assert_allclose(of[ran].sum(1), 2, atol=1e-4)  # top_k
        if name.startswith("single"):  # the double block is one of a group: prompts differ in how often they run it
            for of in maps.values():
                np.testing.assert_allclose(of.mean(0), maps["prompt"].mean(0), atol=1e-5)
    assert numbers["categories"] == sorted(numbers["categories"])
    assert set(numbers["categories"]) <= set(COLOURS)
    assert all(text.endswith(colour) for text, colour in zip(numbers["prompts"], numbers["categories"], strict=True))
    assert pixels(folder / "experts" / "experts.png").std() > 10


def test_what_is_counted_is_what_the_model_routes_where_its_block_runs(folder: Path) -> None:
    """One step, beside what the same model keeps of its routing in training."""
    out, layers = folder / "one", ("single_blocks.0", "double_blocks.1.txt_mlp", "double_blocks.2.txt_mlp")
    options = ("--every", 100, "--steps", 1, "--layers", ",".join(layers), "--out", out)
    arguments = ["analyze", folder / "moe.safetensors", "--what", "experts", "--data", "emoji", *options]
    assert main([str(argument) for argument in arguments]) == 0
    numbers = json.loads((out / "experts.json").read_text())
    seeds = {prompt.text: prompt.index for prompt in read_prompts("emoji", 100)}
    model, data = student().train(), EmojiData()
    texts, batch = data.encode_prompts(numbers["prompts"]), data.batch(0, 5, 0)
    batch.context_BLD, batch.pooled_BV, batch.guidance_B = texts.context_BLD, texts.pooled_BV, torch.full((5,), 3.5)
    noise = noise_for([seeds[text] for text in numbers["prompts"]], batch.image_ids_T3, DIMS.in_channels)
    sample(model, batch, noise, steps=1, mu=EMOJI_SHIFT)
    chosen = model.block_groups[0].routing
    assert isinstance(chosen, BlockRouting)
    runs = dict(zip(layers, (torch.ones(5), *chosen.chosen_BM.T), strict=True))
    for name in layers:
        routing = model.moe_ffns()[name].routing
        assert routing is not None
        by_prompt = (routing.gates_TE != 0).float().unflatten(0, (5, -1)).mean(1)
        for row, expected, ran in zip(numbers["layers"][name]["prompt"], by_prompt, runs[name], strict=True):
            assert row == (pytest.approx(expected.tolist(), abs=1e-5) if ran else [None] * LAYOUT.experts)


def test_a_capacity_router_has_its_figure_6_too(folder: Path) -> None:
    numbers = analyze(folder, "experts", "capacity.safetensors", "--categories", "position")
    sums = np.array(numbers["layers"]["single_blocks.2"]["token"]).sum(1)
    assert sums.max() - sums.min() > 0.01, "tokens differ in how many experts they have"
    assert set(numbers["categories"]) <= {"centre", "left", "right", "top", "bottom"}


def test_figure_8_has_a_row_for_the_teacher_and_each_k(folder: Path) -> None:
    numbers = analyze(
        folder,
        "top-k",
        "moe.safetensors",
        "--teacher",
        folder / "dense.safetensors",
        "--every",
        250,
        "--top-k",
        "0,2,6",
    )
    picture = pixels(folder / "top-k" / "top-k.png")
    top = picture.shape[0] - 4 * 132
    rows = [picture[top + 132 * row : top + 132 * row + 128, 72 : 72 + 2 * 132] for row in range(4)]
    assert all(np.abs(one - other).max() > 0 for one, other in itertools.pairwise(rows))
    assert numbers["top_k"] == [0, 2, 6]
    assert len(numbers["prompts"]) == 2
    assert all(of["low"] <= of["mean"] <= of["high"] for of in numbers["teacher_distance"].values())


def test_mistakes_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(what: str, file: str, *options: str) -> str:
        command = ["analyze", str(folder / file), "--what", what, *FEW, "--out", str(folder / "wrong"), *options]
        assert main(command) == 2
        return capsys.readouterr().err

    assert "is a dense FLUX; --what experts needs a FLUX-MoE" in fails("experts", "dense.safetensors")
    assert "is a dense FLUX; --what top-k needs a FLUX-MoE" in fails("top-k", "dense.safetensors")
    assert "double_blocks.0.img_mlp is not a MoE FFN of this file" in fails(
        "experts", "moe.safetensors", "--layers", "double_blocks.0.img_mlp"
    )
    assert "--top-k is 'one'" in fails("top-k", "moe.safetensors", "--top-k", "one")
    assert "--top-k: top_k is 7; expected 0 to 6" in fails("top-k", "moe.safetensors", "--top-k", "7")
    assert "capacity router" in fails("top-k", "capacity.safetensors")
    assert not (folder / "wrong").exists()

"""The emoji FLUX: its dataset, autoencoder, prompt encoder, scorer and the model itself, as shipped in demo/assets."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from d2m_model.checkpoint import check_file, dims_of
from d2m_model.layout import ffn_tensors, neuron_axis, permute_neurons
from d2m_model.tensor_file import TensorFile
from demo import dataset, prompt_encoder
from demo.autoencoder import TinyAutoencoder, held_out_psnr
from demo.muon import Muon
from demo.sample import emoji_noise, sample_latents, sigmas
from demo.score import decode
from demo.scorer import Scorer, latent_distance
from demo.template_graphs import TEMPLATES, Template
from tools.host import ROOT

ASSETS = dataset.ASSETS


def test_the_dataset_is_as_large_as_it_says() -> None:
    assert len(set(dataset.objects())) >= 300
    assert len(dataset.COLOURS) >= 8
    assert len(dataset.held_out()) == len(dataset.objects()) * len(dataset.COLOURS) // 10


def test_no_training_picture_shows_a_held_out_pair() -> None:
    pictures = dataset.every_training_picture(np.random.default_rng(0))
    pairs = {(picture.object, picture.colour) for picture in pictures}
    assert not pairs & dataset.held_out()
    assert len(pairs | dataset.held_out()) == len(dataset.objects()) * len(dataset.COLOURS)


def test_the_fixed_prompts_are_450_seen_and_50_held_out() -> None:
    held_out = [(p.object, p.colour) in dataset.held_out() for p in dataset.prompts()]
    assert held_out == [False] * 450 + [True] * 50


def test_a_picture_has_its_background_and_its_object_where_the_caption_says() -> None:
    centre = dataset.render(dataset.Picture(object=5, colour=6, position=0))
    left = dataset.render(dataset.Picture(object=5, colour=6, position=1))
    blue = torch.tensor(dataset.COLOURS["blue"]) / 255
    assert torch.equal(centre[:, 0, 0], blue)
    assert torch.equal(left[:, :, : -dataset.STEP], centre[:, :, dataset.STEP :])
    assert not torch.equal(left, centre)


def test_assets_are_small_and_the_model_has_flux_dev_s_format() -> None:
    sizes = {file: file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()}
    assert sizes[dataset.EMOJI_FLUX_MOE] <= 12 * 2**20
    assert sum(sizes.values()) - sizes[dataset.EMOJI_FLUX_MOE] <= 30e6
    with TensorFile(dataset.EMOJI_TEACHER) as file:
        dims = dims_of(file.shapes)
        assert set(file.dtypes.values()) == {torch.bfloat16}
    assert (dims.hidden_size, dims.double_blocks, dims.single_blocks) == (128, 7, 14)
    assert dims.guidance_embed
    assert (dims.in_channels, dims.out_channels) == (64, 64)


def test_the_flux_moe_that_ships_is_the_emoji_flux_converted_by_its_command() -> None:
    """`python -m demo.models` takes a minute. Left out here: what its calibration fits, which depends on the machine."""
    config = check_file(dataset.EMOJI_FLUX_MOE)
    teacher, moe = load_file(dataset.EMOJI_TEACHER), load_file(dataset.EMOJI_FLUX_MOE)
    assert config.teacher.sha256 == hashlib.sha256(dataset.EMOJI_TEACHER.read_bytes()).hexdigest()
    assert config.provenance["preset"] == "L"
    assert config.provenance["data"] == {"name": "emoji", "batches": 32, "batch_size": 8}
    assert len(config.ffns) == 26
    assert config.sensitivity is not None  # by which the template of a compute budget spends
    for name in config.ffns:
        order, tensors = moe[f"{name}.neuron_order"], ffn_tensors(name, config.dims.hidden_size)
        for weight in (f"{tensors.up}.weight", f"{tensors.up}.bias"):
            axis, first = neuron_axis(weight, name, config.dims.hidden_size) or (0, 0)
            assert torch.equal(moe[weight], permute_neurons(teacher[weight], axis, first, order)), weight
    kept = [name for name in teacher if "attn" in name or "_in." in name]
    assert all(torch.equal(moe[name], teacher[name]) for name in kept)


def test_no_rule_keeps_the_shipped_models_out_of_the_repository() -> None:
    files = [str(file) for file in ASSETS.rglob("*") if file.is_file()]
    done = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
    assert not (ROOT / ".comfyignore").exists()  # what it named would be missing from the registry's package


def test_the_autoencoder_restores_what_it_was_not_trained_on() -> None:
    autoencoder = TinyAutoencoder.load(dataset.EMOJI_AUTOENCODER)
    assert held_out_psnr(autoencoder.tiny, count=32) >= 26
    every_colour = [dataset.Picture(object=i, colour=i % 8, position=i % 5) for i in range(40)]
    latents = torch.cat([autoencoder.encode(dataset.render(picture)[None]) for picture in every_colour])
    assert latents.shape == (40, 16, 16, 16)
    assert abs(float(latents.mean())) < 0.1
    assert 0.9 < float(latents.std()) < 1.1


def test_the_autoencoder_file_survives_a_round_trip(tmp_path: Path) -> None:
    TinyAutoencoder.load(dataset.EMOJI_AUTOENCODER).save(tmp_path / "copy.safetensors")
    first, second = load_file(dataset.EMOJI_AUTOENCODER), load_file(tmp_path / "copy.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_prompt_encoder_tells_prompts_apart_and_takes_any_text() -> None:
    encoder = prompt_encoder.load_prompt_encoder(ASSETS / "prompt-encoder.safetensors")
    texts = ["fox in the left on blue", "fox in the left on red", "", "words it never saw " * 20]
    context, pooled = encoder.encode(texts)
    assert context.shape == (4, prompt_encoder.PROMPT_TOKENS, prompt_encoder.WIDTH)
    assert torch.isfinite(context).all()
    distance = torch.cdist(pooled, pooled) + 1e9 * torch.eye(4)
    assert float(distance.min()) > 0.1


def test_a_file_that_is_no_prompt_encoder_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no vocabulary.*expected a prompt encoder"):
        prompt_encoder.load_prompt_encoder(tmp_path / "other.safetensors")


def on_few_backgrounds(pictures: Sequence[dataset.Picture]) -> list[dataset.Picture]:
    """Return the pictures with 3 of 40 pairs of colour and position: retrieval draws all objects for each pair."""
    return [replace(picture, colour=(2, 5, 7)[index % 3], position=index % 3) for index, picture in enumerate(pictures)]


def test_the_scorer_knows_real_renders_and_is_not_fooled_by_others() -> None:
    scorer = Scorer()
    generator = np.random.default_rng(99)
    pictures = [dataset.random_picture(generator) for _ in range(100)]
    hits = scorer.hits(torch.stack([dataset.render(picture) for picture in pictures]), pictures)
    assert {name: float(hit.float().mean()) >= 0.98 for name, hit in hits.items()} == dict.fromkeys(hits, True)
    pictures = on_few_backgrounds(pictures[:60])
    images = torch.stack([dataset.render(picture) for picture in pictures])
    assert float(scorer.retrieved(images, pictures).float().mean()) >= 0.98
    others = scorer.score(images, [*pictures[3:], *pictures[:3]])  # each has the background, and shows another object
    assert others["object"] <= 0.05
    assert others["retrieval"] <= 0.05


def test_the_scorer_does_not_need_colour_to_know_an_object() -> None:
    pictures = dataset.prompts()[:200]
    grey = torch.stack([dataset.render(picture) for picture in pictures]).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert float(Scorer().hits(grey, pictures)["object"].float().mean()) >= 0.9


def test_the_sampler_runs_comfyui_s_schedule() -> None:
    """KSampler's `simple` scheduler on ComfyUI's FLUX (shift 1.15), 4 steps, as ComfyUI 0.30.0 computes it."""
    torch.testing.assert_close(sigmas(4), torch.tensor([1.0, 0.9045, 0.7595, 0.5128, 0.0]), atol=1e-4, rtol=0)


def test_noise_depends_on_the_seed_alone() -> None:
    assert torch.equal(emoji_noise([3, 4])[1], emoji_noise([4])[0])


def test_the_batched_muon_steps_as_torch_s_does() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in ((256, 64), (256, 64), (64, 160))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    before = [parameter.detach().clone() for parameter in ours]
    first = Muon(ours, lr=1e-2, weight_decay=0.01)
    second = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert float((a - b).detach().norm()) <= 0.05 * float((b - start).detach().norm())  # both iterate in bfloat16


@pytest.mark.slow
def test_the_emoji_flux_paints_what_it_is_asked_for() -> None:
    from d2m_model.hosts.diffusers import load_transformer

    chosen = dataset.prompts()[5::20]
    transformer = load_transformer(dataset.EMOJI_TEACHER, torch.float32).eval()
    encoder = prompt_encoder.load_prompt_encoder(ASSETS / "prompt-encoder.safetensors")
    prompts = [picture.caption() for picture in chosen]
    latents = sample_latents(transformer, encoder, prompts, steps=10, seeds=range(5, 500, 20))
    scorer, images = Scorer(), decode(latents)
    scores = {name: float(hit.float().mean()) for name, hit in scorer.hits(images, chosen).items()}
    assert scores["colour"] >= 0.98, scores
    assert scores["position"] >= 0.98, scores
    assert scores["object"] >= 0.95, scores
    few = slice(0, None, 5)  # each has a background of its own, on which retrieval draws all objects
    assert bool(scorer.retrieved(images[few], chosen[few]).all())
    assert latent_distance(latents, latents) == 0


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_an_example_workflow_is_made_from_its_graph(template: Template) -> None:
    folder = ROOT / "example_workflows"
    assert json.loads((folder / "api" / f"{template.name}.json").read_text()) == template.graph
    drawn = json.loads((folder / f"{template.title}.json").read_text())
    assert {str(node["id"]): node["type"] for node in drawn["nodes"] if node["type"] != "MarkdownNote"} == {
        name: node["class_type"] for name, node in template.graph.items()
    }
    with Image.open(folder / f"{template.title}.jpg") as thumbnail:
        assert thumbnail.size == (256, 256)


def test_templates_are_listed_in_the_order_in_which_one_learns() -> None:
    titles = [template.title for template in TEMPLATES]
    assert titles == sorted(titles) == sorted(file.stem for file in (ROOT / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_a_template_begins_with_its_note_and_no_wire_passes_behind_a_node(template: Template) -> None:
    drawn = json.loads((ROOT / "example_workflows" / f"{template.title}.json").read_text())
    boxes = {
        node["id"]: (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for node in drawn["nodes"]
    }
    assert drawn["nodes"][0]["type"] == "MarkdownNote"
    note = boxes.pop(drawn["nodes"][0]["id"])
    assert all(box[1] - 30 > note[3] for box in boxes.values())
    for _, source, slot, target, number, _ in drawn["links"]:
        sockets = [
            it["name"] for it in next(n for n in drawn["nodes"] if n["id"] == target)["inputs"] if "widget" not in it
        ]
        given = next(n for n in drawn["nodes"] if n["id"] == target)["inputs"][number]["name"]
        begin = boxes[source][2], boxes[source][1] + 14 + 20 * slot
        end = boxes[target][0], boxes[target][1] + 14 + 20 * sockets.index(given)
        for part in np.linspace(0.02, 0.98, 97):  # from left to right, smoothly
            x, y = begin[0] + (end[0] - begin[0]) * part, begin[1] + (end[1] - begin[1]) * part**2 * (3 - 2 * part)
            behind = [
                n for n, (left, top, right, bottom) in boxes.items() if left < x < right and top - 30 < y < bottom
            ]
            assert not behind, (source, target, behind)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_groups_of_a_template_are_named_and_lie_apart(template: Template) -> None:
    drawn = json.loads((ROOT / "example_workflows" / f"{template.title}.json").read_text())
    frames = [group["bounding"] for group in drawn["groups"]]
    assert len({group["title"] for group in drawn["groups"]}) == len(frames) >= 3
    for (x, y, width, height), (other_x, other_y, other_width, other_height) in combinations(frames, 2):
        apart = (
            x + width <= other_x or other_x + other_width <= x or y + height <= other_y or other_y + other_height <= y
        )
        assert apart, (x, y, other_x, other_y)

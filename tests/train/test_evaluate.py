"""`python -m d2m_train evaluate`: the images, the scores, and how sure they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from d2m_train.__main__ import main
from d2m_train.evaluation import image_folder
from d2m_train.evaluation.scores import interval
from demo.dataset import ASSETS, EMOJI_TEACHER, prompts

TEACHER = EMOJI_TEACHER
FEW = ("--data", "emoji", "--every", "125", "--steps", "2")
GENEVAL = (
    {"tag": "single_object", "include": [{"class": "fox", "count": 1}], "prompt": "fox in the left on blue"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "cat in the top on red"},
)


def command(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert command(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The emoji FLUX split in two ways, weights untouched."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name in ("dealt", "random"):
        found[name] = folder / f"{name}.safetensors"
        options = ["--split-only", "--experts", name, "--out", str(found[name])]
        assert main(["convert", "--teacher", str(TEACHER), *options]) == 0
    return found


@pytest.fixture(scope="module")
def evaluated(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    options = ("--teacher", TEACHER, "--against", files["random"], "--out", out)
    assert command(files["dealt"], *FEW, *options) == 0
    return out


def test_images_lie_as_geneval_reads_them(evaluated: Path) -> None:
    for name in ("images", "teacher", "against"):
        folders = sorted(path.name for path in (evaluated / name).iterdir() if path.is_dir())
        assert folders == ["00000", "00125", "00250", "00375"]
    for index in (0, 125):
        metadata = json.loads((evaluated / "images" / f"{index:05}" / "metadata.jsonl").read_text())
        assert metadata["prompt"] == prompts()[index].caption()
        assert Image.open(evaluated / "images" / f"{index:05}" / "samples" / "0000.png").size == (128, 128)


def test_the_teacher_paints_what_the_demo_does_from_the_same_seeds(evaluated: Path) -> None:
    from d2m_model.hosts.diffusers import load_transformer
    from demo.prompt_encoder import load_prompt_encoder
    from demo.sample import sample_latents
    from demo.train import patchify

    model, encoder = (
        load_transformer(TEACHER, torch.float32),
        load_prompt_encoder(ASSETS / "prompt-encoder.safetensors"),
    )
    latents = sample_latents(model, encoder, [prompts()[125].caption()], steps=2, seeds=[125])
    kept = load_file(evaluated / "teacher" / "00125" / "latents" / "0000.safetensors")["tokens"]
    torch.testing.assert_close(kept, patchify(latents)[0], rtol=1e-4, atol=1e-4)


def test_the_report_has_every_score_with_its_interval_and_the_paired_difference(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    own, other = (json.loads((evaluated / n / "scores.json").read_text()) for n in ("images", "against"))
    assert set(report["scores"]) == {"object", "colour", "position", "retrieval", "teacher_distance"}
    assert set(report["teacher"]["scores"]) == set(report["scores"]) - {"teacher_distance"}
    for name, found in report["scores"].items():
        assert found["low"] <= found["mean"] <= found["high"]
        assert found["mean"] == pytest.approx(np.mean(own[name]), abs=1e-6)
    difference = report["against"]["difference"]["teacher_distance"]
    values = np.subtract(own["teacher_distance"], other["teacher_distance"])
    assert difference["mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert (difference["low"], difference["high"]) == pytest.approx((values.min(), values.max()), abs=0.3)
    assert 0.05 < report["scores"]["teacher_distance"]["mean"] < 2, "two of twelve experts are not the teacher"


def test_with_every_expert_a_split_file_is_its_teacher(files: dict[str, Path], tmp_path: Path) -> None:
    options = ("--teacher", TEACHER, "--top-k", 12, "--every", 250, "--out", tmp_path)
    assert command(files["dealt"], *FEW[:2], "--steps", 2, *options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scores"]["teacher_distance"]["high"] < 1e-4
    assert report["top_k"] == 12


def test_an_interrupted_evaluation_makes_only_what_is_missing(
    evaluated: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    distance = json.loads((evaluated / "report.json").read_text())["scores"]["teacher_distance"]
    lost = evaluated / "images" / "00125" / "samples" / "0000.png"
    painted, before = (
        np.asarray(Image.open(lost), int),
        {file: file.stat().st_mtime_ns for file in evaluated.rglob("*.png")},
    )
    lost.unlink()
    sampled: list[int] = []
    sample = image_folder.sample

    def counting(model: Any, batch: Any, noise: torch.Tensor, **options: Any) -> torch.Tensor:
        sampled.append(len(noise))
        return sample(model, batch, noise, **options)

    monkeypatch.setattr(image_folder, "sample", counting)
    options = ("--teacher", TEACHER, "--against", files["random"], "--out", evaluated)
    assert command(files["dealt"], *FEW, *options) == 0
    assert sampled == [1], "one image, of one model"
    assert np.abs(np.asarray(Image.open(lost), int) - painted).max() <= 1, (
        "rounding depends on what is sampled beside it"
    )
    assert all(file.stat().st_mtime_ns == time for file, time in before.items() if file != lost)
    found = json.loads((evaluated / "report.json").read_text())["scores"]["teacher_distance"]
    assert found == pytest.approx(distance, abs=1e-4)


def test_a_folder_of_other_settings_is_left_alone(
    evaluated: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, files["dealt"], *FEW[:4], "--steps", 3, "--out", evaluated)
    assert "images with other settings: steps 2, now 3" in said
    assert "--out" in said
    assert "top_k None, now 4" in fails(capsys, files["dealt"], *FEW, "--top-k", 4, "--out", evaluated)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in transformers' layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz,"))
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(words), **ends},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_geneval_prompts_with_several_seeds_and_clip_score(clip: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    options = ("--data", file, "--text-encoders", "emoji", "--steps", 2, "--seeds", 2, "--clip", clip, "--out", out)
    assert command(TEACHER, *options) == 0
    for index, line in enumerate(GENEVAL):
        folder = out / "images" / f"{index:05}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert sorted(image.name for image in (folder / "samples").iterdir()) == ["0000.png", "0001.png"]
        first, second = ((folder / "samples" / f"000{n}.png").read_bytes() for n in (0, 1))
        assert first != second
    assert list(json.loads((out / "report.json").read_text())["scores"]) == ["clip_score"]
    (scores,) = json.loads((out / "images" / "scores.json").read_text()).values()
    for index, line in enumerate(GENEVAL):
        images = [Image.open(out / "images" / f"{index:05}" / "samples" / f"000{n}.png") for n in (0, 1)]
        assert scores[index] == pytest.approx(
            np.mean([by_hand(clip, i, str(line["prompt"])) for i in images]), abs=1e-3
        )


def by_hand(folder: Path, image: Image.Image, text: str) -> float:
    """100 times the cosine, by transformers alone."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        found = model(**processor(text=[text], images=image, return_tensors="pt", padding=True))
    return max(0.0, 100 * float((found.image_embeds * found.text_embeds).sum()))


def test_intervals_are_those_of_the_mean_and_pairing_narrows_them() -> None:
    generator = np.random.default_rng(0)
    easy = generator.normal(size=400)
    ours, theirs = (easy + 0.1 * generator.normal(size=400) + shift for shift in (0.1, 0.0))
    found = interval(ours)
    error = ours.std() / 20
    assert (found.low, found.high) == pytest.approx((ours.mean() - 1.96 * error, ours.mean() + 1.96 * error), abs=0.01)
    assert found.low < interval(theirs).high, "apart from each other they could be equal"
    assert interval(ours - theirs).low > 0.05


def test_mistakes_are_said_before_anything_is_sampled(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    listed, broken, empty = tmp_path / "list.txt", tmp_path / "broken.jsonl", tmp_path / "empty.txt"
    listed.write_text("fox\n\ncat\n")
    broken.write_text('{"text": "cat"}\n')
    empty.write_text("\n")
    assert "needs --text-encoders" in fails(capsys, TEACHER, "--data", listed, *out)
    emoji = ("--text-encoders", "emoji")
    assert "1 × line without a prompt (line 1)" in fails(capsys, TEACHER, "--data", broken, *emoji, *out)
    assert "has no prompts" in fails(capsys, TEACHER, "--data", empty, *emoji, *out)
    assert "cannot be read" in fails(capsys, TEACHER, "--data", tmp_path / "none.txt", *emoji, *out)
    assert "--size is 100x128" in fails(capsys, TEACHER, *FEW, "--size", "100x128", *out)
    assert "--seeds is 0; expected 1 or more" in fails(capsys, TEACHER, *FEW, "--seeds", 0, *out)
    assert "--clip" in fails(capsys, TEACHER, *FEW, "--clip", tmp_path, *out)
    assert "is a dense FLUX; --top-k need a FLUX-MoE" in fails(capsys, TEACHER, *FEW, "--top-k", 2, *out)
    assert "top_k is 13; expected 0 to 12" in fails(capsys, files["dealt"], *FEW, "--top-k", 13, *out)
    assert "no block groups" in fails(capsys, files["dealt"], *FEW, "--active-blocks", 1, *out)
    assert "has top-k routers" in fails(capsys, files["dealt"], *FEW, "--capacity-factor", 2, *out)
    assert not (tmp_path / "out").exists()

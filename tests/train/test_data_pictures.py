"""Batches of images, shards, tables and prompts: encoded once, exactly repeatable, with clear errors."""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import pyarrow
import pytest
import torch
from einops import rearrange
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from d2m_train import UserError
from d2m_train.data import DataSource, open_source, pictures
from d2m_train.data.batch import Batch
from d2m_train.data.encoders import FluxAutoencoder, FluxTextEncoders
from d2m_train.data.pictures import PictureSource
from d2m_train.data.prompts import PromptSource
from d2m_train.run_config import DataSection
from d2m_train.training.run_identity import check_same_sources
from tests.toys.pictures import SIZES, caption, png, save_images
from tests.toys.pipeline import CONTEXT, POOLED, SCALE, SHIFT, save_pipeline

TOKENS = 20  # of text


def section(source: str, path: Path, pipeline: Path, **fields: object) -> DataSection:
    settings = {
        "text_encoders": str(pipeline),
        "vae": str(pipeline),
        "text_tokens": TOKENS,
        "resolutions": (64,),
        "held_out": 0,
    }
    return DataSection.model_validate(
        {"source": source, "path": path, "encoder_dtype": "float32", **settings, **fields}
    )


def opened(run: Path, pipeline: Path, source: str = "folder", path: Path | None = None, **fields: object) -> DataSource:
    return open_source(section(source, path or run / "images", pipeline, **fields), run)


def pictures_of(run: Path, pipeline: Path, **fields: object) -> PictureSource:
    source = opened(run, pipeline, **fields)  # type: ignore[arg-type]
    assert isinstance(source, PictureSource)
    return source


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, and its data below it."""
    save_images(tmp_path / "images")
    return tmp_path


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hears of everything that encoders make: captions, and sizes of images."""
    made: list[str] = []
    encode_texts, encode_images = FluxTextEncoders.encode, FluxAutoencoder.encode

    def texts(self: FluxTextEncoders, prompts: list[str]) -> object:
        made.extend(prompts)
        return encode_texts(self, prompts)

    def images(self: FluxAutoencoder, images: Tensor) -> Tensor:
        made.append("x".join(map(str, images.shape[2:])))
        return encode_images(self, images)

    monkeypatch.setattr(FluxTextEncoders, "encode", texts)
    monkeypatch.setattr(FluxAutoencoder, "encode", images)
    return made


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(mine, its) if isinstance(mine, torch.Tensor) else mine == its
        for mine, its in ((getattr(a, name), getattr(b, name)) for name in Batch.__slots__)
    )


# What a batch is


@torch.no_grad()
def test_a_batch_is_what_flux_pipelines_parts_make_of_the_sample(tmp_path: Path, pipeline: Path) -> None:
    from diffusers import AutoencoderKL, FluxPipeline

    save_images(tmp_path / "images", [(96, 48)])
    batch = opened(tmp_path, pipeline).batch(0, 2, seed=0)
    whole = FluxPipeline.from_pretrained(pipeline, transformer=None, vae=None, scheduler=None)
    context, pooled, text_ids = whole.encode_prompt(caption(0), None, max_sequence_length=TOKENS)
    torch.testing.assert_close(batch.context_BLD, context.expand(2, -1, -1))
    torch.testing.assert_close(batch.pooled_BV, pooled.expand(2, -1))
    assert torch.equal(batch.text_ids_L3, text_ids)
    words = len(caption(0).replace(",", " ,").split()) + 1
    assert words + 1 >= batch.words_BL[0].sum() >= words - 1
    assert batch.words_BL[0].int().diff().max() == 0  # padding comes last

    image = Image.open(tmp_path / "images" / "00.png").resize((80, 48), Image.Resampling.LANCZOS, box=(8, 0, 88, 48))
    vae = AutoencoderKL.from_pretrained(pipeline / "vae")
    seen = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 48, 80, 3).permute(0, 3, 1, 2)
    latents = (vae.encode(seen / 127.5 - 1).latent_dist.mode() - SHIFT) * SCALE
    packed = FluxPipeline._pack_latents(latents, 1, 16, 6, 10)
    assert batch.tokens_BTC is not None
    torch.testing.assert_close(batch.tokens_BTC, packed.expand(2, -1, -1), rtol=0, atol=1e-5)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(batch.image_ids_T3, ids)

    shown = opened(tmp_path, pipeline).decode(batch.tokens_BTC, batch.image_ids_T3)
    assert shown is not None
    unpacked = rearrange(packed, "b (h w) (c p q) -> b c (h p) (w q)", h=3, w=5, p=2, q=2)
    expected = vae.decode(unpacked / SCALE + SHIFT).sample
    torch.testing.assert_close(shown[:1], (expected / 2 + 0.5).clamp(0, 1))


def test_all_samples_of_a_batch_have_one_size_and_every_sample_comes(run: Path, pipeline: Path) -> None:
    source = pictures_of(run, pipeline)
    batches = [source.batch(index, 2, seed=0) for index in range(len(SIZES))]
    assert source.buckets() == [((48, 80), 1), ((64, 64), 5), ((80, 48), 3)]
    assert {batch.images().shape for batch in batches} == {(2, 15, 64), (2, 16, 64)}
    heights = {(int(batch.image_ids_T3[:, 1].max()) + 1, batch.images().shape[1]) for batch in batches}
    assert heights == {(5, 15), (4, 16), (3, 15)}
    contents = torch.cat([batch.images().flatten(1)[:, :900] for batch in batches])
    assert len(contents.unique(dim=0)) == len(SIZES)  # two epochs: twice each


def test_several_resolutions_have_their_own_buckets(tmp_path: Path, pipeline: Path) -> None:
    save_images(tmp_path / "images", [(200, 200), (64, 64), (63, 64), (40, 40), (128, 64)])
    source = pictures_of(tmp_path, pipeline, resolutions=(64, 128), enlarge=1.1)
    assert source.buckets() == [((64, 64), 2), ((80, 48), 1), ((128, 128), 1)]
    assert source.left_out == {"image that is too small": ["03.png"]}


def test_guidance_is_drawn_from_the_runs_range(run: Path, pipeline: Path) -> None:
    source = open_source(section("folder", run / "images", pipeline), run, guidance=(7.0, 8.0))
    drawn = torch.cat([source.batch(index, 8, seed=0).guidance_B for index in range(6)])
    assert 7 <= drawn.min() < 7.2
    assert 7.8 < drawn.max() <= 8


# Again and again the same


@pytest.mark.parametrize("source", ["folder", "webdataset", "parquet", "prompts"])
def test_a_batch_depends_on_its_number_alone(run: Path, pipeline: Path, source: str) -> None:
    path = run / "images"
    numbers = range(len(SIZES))
    if source == "webdataset":
        path = run / "s-{0..1}.tar"
        for shard in (0, 1):
            with tarfile.open(run / f"s-{shard}.tar", "w") as archive:
                for number in numbers[shard::2]:
                    for suffix in ("png", "txt"):
                        archive.add(run / "images" / f"{number:02}.{suffix}", f"{number}.{suffix}")
    elif source == "parquet":
        path = run / "table.parquet"
        images = [{"bytes": png(*SIZES[number], seed=number), "path": None} for number in numbers]
        parquet.write_table(pyarrow.table({"image": images, "text": [caption(number) for number in numbers]}), path)
    elif source == "prompts":
        path = run / "prompts.txt"
        path.write_text("\n".join(map(caption, numbers)))
    first = opened(run, pipeline, source, path)
    batches = [first.batch(index, 2, seed=5) for index in range(12)]
    assert not any(same(a, b) for a, b in pairwise(batches))
    for other in (opened(run, pipeline, source, path), opened(run / "another", pipeline, source, path)):
        assert other.identity == first.identity
        assert all(same(other.batch(index, 2, seed=5), batches[index]) for index in (11, 3, 0))
        assert not same(other.batch(0, 2, seed=6), batches[0])


def test_prepared_by_two_ranks_it_needs_no_encoders(
    run: Path, pipeline: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "PART", 2)
    at_once = opened(run / "alone", pipeline, path=run / "images")
    expected = [at_once.batch(index, 2, seed=0) for index in range(9)]
    needed = sorted(encoded)
    encoded.clear()

    models = shutil.copytree(pipeline, run / "models")
    ranks = [opened(run, models) for _ in range(2)]
    heard: list[tuple[int, int]] = []
    ranks[0].prepare(0, 2, lambda done, total: heard.append((done, total)))
    assert heard == [(done, 5) for done in range(1, 6)]
    share = len(encoded)
    ranks[1].prepare(1, 2)
    assert 0 < share < len(encoded)
    assert sorted(encoded) == needed
    shutil.rmtree(models)
    later = [*ranks, opened(run, models)]
    later[2].prepare()
    for source in later:
        assert all(same(source.batch(index, 2, seed=0), expected[index]) for index in range(9))
    assert later[2].decode(expected[0].images(), expected[0].image_ids_T3) is None
    with pytest.raises(UserError, match=r"data\.text_encoders: .*models: there is no such folder"):
        later[2].encode_prompts(["never seen"])
    with pytest.raises(UserError, match="there is no such folder"):
        opened(run / "without a cache", models, path=run / "images")


def test_interrupted_preparing_goes_on_where_it_was(
    run: Path, pipeline: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = FluxAutoencoder.encode
    with monkeypatch.context() as patch:

        def killed(self: FluxAutoencoder, images: Tensor) -> Tensor:
            if len(encoded) >= 6:
                raise KeyboardInterrupt
            return encode(self, images)

        patch.setattr(FluxAutoencoder, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(run, pipeline).prepare()
    before = list(encoded)
    encoded.clear()
    source = opened(run, pipeline)
    source.prepare()
    assert len(before) == 6
    assert len(encoded) == 2 * len(SIZES) - 6
    encoded.clear()
    source.batch(0, 2, seed=0)
    assert encoded == []


def test_the_encoders_are_let_go_after_preparing(run: Path, pipeline: Path) -> None:
    source = pictures_of(run, pipeline)
    source.prepare()
    parts = source.encoded.autoencoder, source.encoded.text_encoders
    assert isinstance(parts[0], FluxAutoencoder)
    assert isinstance(parts[1], FluxTextEncoders)
    assert parts[0]._vae is None
    assert parts[1]._pipeline is None


# Identity


def test_a_copy_with_other_times_is_the_same_data(run: Path, pipeline: Path) -> None:
    first = pictures_of(run, pipeline)
    copied = Path(shutil.copytree(run / "images", run / "copied"))
    for file in copied.iterdir():
        os.utime(file, (1, 1))
    (copied / "readme.txt").write_text("about these pictures")
    (copied / "list.csv").touch()
    again = pictures_of(run, pipeline, path=copied)
    assert again.listing != first.listing
    assert again.identity == first.identity


def test_what_has_changed_since_is_named(run: Path, pipeline: Path, tmp_path: Path) -> None:
    first = pictures_of(run, pipeline)
    sources = tmp_path / "sources.json"
    check_same_sources({"teacher.fingerprint": "t", "data.identity": first.identity}, first, sources)
    (run / "shared").mkdir()
    (run / "shared" / "log.jsonl").touch()
    edited = first.samples.name(1)
    (run / "images" / edited).with_suffix(".txt").write_text("another caption")
    second = pictures_of(run, pipeline)
    with pytest.raises(UserError, match=rf"There were \d+ samples and are \d+; new or changed: {edited}\."):
        check_same_sources({"teacher.fingerprint": "t", "data.identity": second.identity}, second, sources)


def test_other_data_have_another_identity(run: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = opened(run, pipeline).identity
    others = [
        opened(run, pipeline, resolutions=(64, 96)).identity,
        opened(run, pipeline, text_tokens=16).identity,
        opened(run, save_pipeline(tmp_path_factory.mktemp("other") / "pipeline", seed=1)).identity,
    ]
    elsewhere = shutil.copytree(pipeline, tmp_path_factory.mktemp("moved") / "pipeline")
    assert (
        opened(run, elsewhere).identity == opened(run / "other cache", pipeline, path=run / "images").identity == first
    )
    (run / "images" / "03.txt").write_text("another caption")
    assert len({first, *others, opened(run, pipeline).identity}) == 5


def test_only_what_changed_is_encoded_again(run: Path, pipeline: Path, encoded: list[str]) -> None:
    opened(run, pipeline).prepare()
    encoded.clear()
    (run / "images" / "00.txt").write_text("a dog")
    (run / "images" / "01.png").write_bytes(png(64, 64, seed=99))
    opened(run, pipeline).prepare()
    assert sorted(encoded) == ["64x64", "a dog"]


# Damage


def entries(run: Path, kind: str) -> list[Path]:
    return sorted((run / "cache" / kind).rglob("*.safetensors"))


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_entry_is_named_and_made_again(
    run: Path, pipeline: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = opened(run, pipeline)
    expected = [source.batch(index, 2, seed=0) for index in range(9)]
    for file in entries(run, kind):
        damage(file)
    with caplog.at_level(logging.WARNING):
        again = opened(run, pipeline)
        assert all(same(again.batch(index, 2, seed=0), expected[index]) for index in range(9))
    for file in entries(run, kind):
        assert sum(f"{file} is damaged" in message for message in caplog.messages) == 1
    caplog.clear()
    assert same(opened(run, pipeline).batch(0, 2, seed=0), expected[0])
    assert caplog.messages == []


def test_a_damaged_entry_whose_image_is_gone_or_another_stops_the_run(run: Path, pipeline: Path) -> None:
    save_images(run / "one", [(64, 64)])
    source = opened(run, pipeline, path=run / "one")
    source.batch(0, 1, seed=0)
    (file,) = entries(run, "latents")
    damage(file)
    (run / "one" / "00.png").write_bytes(png(64, 64, seed=5))
    with pytest.raises(UserError, match=r"00\.png of one has another content than when it was listed"):
        source.batch(1, 1, seed=0)
    (run / "one" / "00.png").unlink()
    with pytest.raises(UserError) as error:
        source.batch(1, 1, seed=0)
    assert f"{file} is damaged (its checksum differs), and cannot be made again from 00.png" in str(error.value)
    assert "00.png of one is not there any more" in str(error.value)


def test_an_entry_that_was_deleted_is_made_again(run: Path, pipeline: Path) -> None:
    source = opened(run, pipeline)
    expected = source.batch(0, 2, seed=0)
    shutil.rmtree(run / "cache" / "latents")
    shutil.rmtree(run / "cache" / "text")
    assert same(source.batch(0, 2, seed=0), expected)


# Samples that cannot be used


def test_unusable_samples_are_left_out_counted_and_named(
    run: Path, pipeline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "images"
    for number in range(5):
        (folder / f"broken{number}.png").write_bytes(
            [b"", b"no image", png(64, 64)[:150], b"\x89PNG\r\n", b"GIF8"][number]
        )
        (folder / f"broken{number}.txt").write_text("words")
    (folder / "tiny.png").write_bytes(png(20, 20))
    (folder / "tiny.txt").write_text("words")
    (folder / "empty.png").write_bytes(png(64, 64))
    (folder / "empty.txt").write_text("\n")
    (folder / "alone.png").write_bytes(png(64, 64))
    (folder / "words.txt").write_text("words")
    source = pictures_of(run, pipeline)
    with caplog.at_level(logging.WARNING):
        assert sum(count for _, count in source.buckets()) == len(SIZES)
    assert {reason: len(names) for reason, names in source.left_out.items()} == {
        "image without a caption": 1,
        "caption without an image": 1,
        "broken image": 5,
        "empty caption": 1,
        "image that is too small": 1,
    }
    (message,) = caplog.messages
    assert message.startswith("images: left out 1 × image without a caption (alone.png), 1 × caption without an image")
    assert "5 × broken image (broken0.png: not a picture that Pillow knows, broken1.png: not a" in message
    assert "broken2.png: " in message


def test_captions_without_images_are_told(tmp_path: Path, pipeline: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.txt").write_text("words")
    with pytest.raises(UserError) as error:
        opened(tmp_path, pipeline)
    said = str(error.value)
    assert "No usable sample. Looked for images (.avif" in said
    assert "each with a .txt of the same name beside it" in said
    assert said.endswith("Found 4 × caption without an image (0.txt, 1.txt, 2.txt, …).")


def test_images_that_are_all_unusable_are_told(tmp_path: Path, pipeline: Path) -> None:
    save_images(tmp_path / "images", [(20, 20), (30, 30)])
    with pytest.raises(UserError) as error:
        opened(tmp_path, pipeline).batch(0, 1, seed=0)
    assert "large enough for resolution 64 when enlarged at most 1.25 times" in str(error.value)
    assert "Found 2 × image that is too small (00.png, 01.png)." in str(error.value)


# Prompts alone


def test_prompts_alone_give_batches_without_images(run: Path, pipeline: Path, encoded: list[str]) -> None:
    (run / "prompts.jsonl").write_text('{"prompt": "a cat"}\n\n{"prompt": ""}\n{"words": 1}\nx\n{"prompt": "a dog "}\n')
    source = opened(run, pipeline, "prompts", run / "prompts.jsonl", resolutions=(64, 96))
    assert isinstance(source, PromptSource)
    assert source.prompts == ["a cat", "a dog"]
    assert source.left_out == {"line without a prompt": ["line 3", "line 4", "line 5"]}
    source.prepare(1, 2)
    assert encoded == ["a dog"]
    batches = [source.batch(index, 2, seed=0) for index in range(20)]
    assert encoded == ["a dog", "a cat"]
    assert {len(batch.image_ids_T3) for batch in batches} == {16, 36}
    assert all(batch.tokens_BTC is None for batch in batches)
    assert batches[0].context_BLD.shape == (2, TOKENS, CONTEXT)
    assert batches[0].pooled_BV.shape == (2, POOLED)
    with pytest.raises(UserError, match="prompts only; calibration needs images or precomputed latents"):
        batches[0].images()


def test_files_of_prompts_that_are_none(run: Path, pipeline: Path) -> None:
    (run / "empty.txt").write_text("\n \n")
    (run / "prompts.csv").write_text("a cat")
    for name, expected in (
        ("empty.txt", "no prompts; expected a .txt of prompts, one a line, or a .jsonl"),
        ("prompts.csv", "expected a .txt of prompts"),
        ("none.txt", r"cannot be read \(No such file"),
    ):
        with pytest.raises(UserError, match=expected):
            opened(run, pipeline, "prompts", run / name)


def test_prompts_for_evaluation_are_encoded_once(run: Path, pipeline: Path, encoded: list[str]) -> None:
    source = opened(run, pipeline)
    first = source.encode_prompts(["a red cat", "a dog"])
    second = source.encode_prompts(["a dog", "a red cat"])
    assert encoded == ["a red cat", "a dog"]
    assert torch.equal(first.context_BLD, second.context_BLD.flip(0))
    assert torch.equal(first.words_BL, second.words_BL.flip(0))


# Encoders


def test_encoders_that_are_none_are_told(run: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pipeline, run / "partly")
    shutil.rmtree(run / "partly" / "tokenizer_2")
    with pytest.raises(
        UserError, match=r"data\.text_encoders: .*partly has no tokenizer_2\. Expected a diffusers FLUX"
    ):
        opened(run, run / "partly")
    with pytest.raises(
        UserError, match=r"data\.vae: .*images has no vae\. Expected .* with vae, the folder vae, or ae"
    ):
        opened(run, pipeline, vae=str(run / "images"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"somebody/flux: there is no such folder, and the hub did not give it"):
        opened(run, Path("somebody/flux"))
    damaged = shutil.copytree(pipeline, run / "damaged")
    (damaged / "text_encoder_2" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"damaged: cannot be loaded as a diffusers FLUX pipeline"):
        opened(run, damaged).encode_prompts(["a cat"])


def test_half_precision_encoders_keep_half_the_bytes(run: Path, pipeline: Path) -> None:
    full, half = (
        opened(run / dtype, pipeline, path=run / "images", encoder_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    wide, narrow = full.encode_prompts(["a cat"]), half.encode_prompts(["a cat"])
    assert narrow.context_BLD.dtype == torch.float32
    assert torch.equal(narrow.context_BLD, narrow.context_BLD.bfloat16().float())
    torch.testing.assert_close(narrow.context_BLD, wide.context_BLD, rtol=0.05, atol=0.05)
    again = opened(run / "bfloat16", pipeline, path=run / "images", encoder_dtype="bfloat16").encode_prompts(["a cat"])
    assert torch.equal(again.context_BLD, narrow.context_BLD)
    assert full.identity != half.identity

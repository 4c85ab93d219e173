"""The emoji dataset's pool, and precomputed latents with encoders beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2m_train import UserError
from d2m_train.data import emoji, open_source
from d2m_train.data.emoji import EmojiAutoencoder, EmojiData
from d2m_train.run_config import DataSection


def pool(folder: Path, count: int, held_out: float = 0) -> EmojiData:
    source = open_source(DataSection(source="emoji", pool=count, held_out=held_out), folder, guidance=(2.0, 3.0))
    assert isinstance(source, EmojiData)
    return source


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Hears how many pictures are encoded. Four make an entry."""
    made: list[int] = []
    encode = EmojiAutoencoder.encode

    def counted(self: EmojiAutoencoder, images: Tensor) -> Tensor:
        made.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(EmojiAutoencoder, "encode", counted)
    monkeypatch.setattr(emoji, "POOL_PART", 4)
    return made


def test_a_pool_is_encoded_once_and_comes_in_permutations(tmp_path: Path, encoded: list[int]) -> None:
    first = pool(tmp_path, 6)
    heard: list[tuple[int, int]] = []
    first.prepare(0, 2, lambda done, total: heard.append((done, total)))
    assert (encoded, heard) == ([4], [(4, 4)])
    first.prepare(1, 2)
    batches = [first.batch(index, 3, seed=0) for index in range(4)]
    tokens = torch.cat([batch.images() for batch in batches])
    assert len(tokens[:6].flatten(1).unique(dim=0)) == len(tokens[6:].flatten(1).unique(dim=0)) == 6
    assert all(2 <= guidance <= 3 for batch in batches for guidance in batch.guidance_B)

    again = pool(tmp_path, 6).batch(2, 3, seed=0)
    for name in ("tokens_BTC", "context_BLD", "pooled_BV", "guidance_B", "words_BL"):
        assert torch.equal(getattr(again, name), getattr(batches[2], name))
    larger = pool(tmp_path, 12)
    larger.prepare()
    assert encoded == [4, 4, 4]
    assert len({first.identity, larger.identity, EmojiData().identity}) == 3


def test_pictures_of_a_pool_are_what_their_captions_say(tmp_path: Path, encoded: list[int]) -> None:
    source = pool(tmp_path, 4)
    assert source.pool is not None
    pictures, latents = source.pool.chosen([3, 0])
    fresh = source.autoencoder.encode(torch.stack([source.dataset.render(picture) for picture in pictures]))
    torch.testing.assert_close(latents, fresh, rtol=0, atol=0.03)
    captions = {picture.caption(number) for picture in source.pool.parts[0] for number in range(3)}
    batch = source.batch(0, 4, seed=1)
    known = source.encode_prompts(sorted(captions)).pooled_BV
    assert (torch.cdist(batch.pooled_BV, known).min(dim=1).values < 1e-3).all()


def test_pictures_of_a_pool_are_trained_on_or_held_out(tmp_path: Path) -> None:
    source = pool(tmp_path, 4, held_out=0.3)
    sides = [
        {source.batch(index, 1, 0, held_out=held_out).images().numpy().tobytes() for index in range(4)}
        for held_out in (False, True)
    ]
    assert not sides[0] & sides[1]
    assert f"4 samples, {len(sides[1])} of them held out" in source.split_text()


def test_a_damaged_pool_is_made_again(tmp_path: Path, encoded: list[int]) -> None:
    expected = pool(tmp_path, 4).batch(0, 4, seed=0)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(pool(tmp_path, 4).batch(0, 4, seed=0).images(), expected.images())
    assert encoded == [4, 4]


def test_the_emoji_source_decodes_what_it_encodes() -> None:
    source = EmojiData()
    batch = source.batch(0, 2, seed=0)
    shown = source.decode(batch.images(), batch.image_ids_T3)
    assert shown is not None
    assert shown.shape == (2, 3, 128, 128)
    generator = np.random.default_rng((0, 0))
    images = torch.stack([source.dataset.render(source.dataset.random_picture(generator)) for _ in range(2)])
    assert (shown - images).abs().mean() < 0.02
    assert source.encode_prompts(["a cat"]).context_BLD.shape == (1, 12, 128)


def test_precomputed_latents_are_decoded_where_an_autoencoder_is_named(tmp_path: Path) -> None:
    tensors = {"latents": torch.randn(2, 16, 4, 6), "context": torch.randn(2, 3, 8), "pooled": torch.randn(2, 4)}
    save_file(tensors, tmp_path / "data.safetensors")
    bare = open_source(DataSection(source="latents", path=tmp_path / "data.safetensors"), tmp_path)
    batch = bare.batch(0, 2, seed=0)
    assert bare.decode(batch.images(), batch.image_ids_T3) is None
    with pytest.raises(UserError, match=r"set data\.text_encoders to a diffusers FLUX pipeline"):
        bare.encode_prompts(["a cat"])
    section = DataSection(source="latents", path=tmp_path / "data.safetensors", vae="emoji", text_encoders="emoji")
    whole = open_source(section, tmp_path)
    assert whole.identity == bare.identity
    shown = whole.decode(batch.images(), batch.image_ids_T3)
    assert shown is not None
    assert shown.shape == (2, 3, 32, 48)
    assert whole.encode_prompts(["a cat"]).pooled_BV.shape == (1, 128)

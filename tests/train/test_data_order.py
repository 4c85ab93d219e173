"""Order and size of the samples."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d2m_train.data.buckets import buckets, choose_bucket, fit_to_size, pixels
from d2m_train.data.order import BucketOrder, sample_order
from d2m_train.data.picture_file import upright

# Order


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 5))
def test_every_sample_comes_equally_often_however_small_its_bucket(counts: list[int], size: int) -> None:
    """Every bucket fills whole batches in `size` epochs."""
    order = BucketOrder(counts, size, seed=3)
    seen: Counter[tuple[int, int]] = Counter()
    for index in range(sum(counts)):
        bucket, samples = order.batch(index)
        assert len(samples) == size
        seen.update((bucket, sample) for sample in samples)
    assert seen == {(bucket, sample): size for bucket, count in enumerate(counts) for sample in range(count)}


def test_a_batch_is_known_without_those_before() -> None:
    asked_in_turn = BucketOrder([7, 3, 11], 4, seed=0)
    batches = [asked_in_turn.batch(index) for index in range(300)]
    for index in (299, 0, 57):
        assert BucketOrder([7, 3, 11], 4, seed=0).batch(index) == batches[index]


def test_buckets_alternate_and_epochs_differ() -> None:
    order = BucketOrder([40, 40], 4, seed=0)
    epochs = [[order.batch(index) for index in range(start, start + 20)] for start in (0, 20)]
    for epoch in epochs:
        taken = [bucket for bucket, _ in epoch]
        assert taken not in (sorted(taken), sorted(taken, reverse=True))
        assert {(bucket, sample) for bucket, samples in epoch for sample in samples} == {
            (bucket, sample) for bucket in (0, 1) for sample in range(40)
        }
    assert epochs[0] != epochs[1]
    assert [BucketOrder([40, 40], 4, seed=1).batch(index) for index in range(20)] != epochs[0]


def test_permutations_follow_one_another() -> None:
    drawn = sample_order(5, 0, 15, (0,))
    assert [sorted(drawn[start : start + 5]) for start in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert sample_order(5, 7, 4, (0,)) == drawn[7:11]


# Sizes


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024, 1536])
def test_buckets_have_about_the_same_area_and_whole_tokens(resolution: int) -> None:
    for width, height in buckets(resolution):
        assert width % 16 == height % 16 == 0
        assert width * height == pytest.approx(resolution**2, rel=0.03)
        assert (height, width) in buckets(resolution)
    assert (resolution, resolution) in buckets(resolution)
    assert (resolution // 2, resolution * 2) in buckets(resolution)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (3000, 3000, (1024, 1024)),
        (4000, 3000, (1168, 896)),
        (3000, 4000, (896, 1168)),
        (9000, 1000, (2048, 512)),  # longer than the longest bucket: the ends are cut
        (820, 820, (1024, 1024)),  # enlarged by 1.25
        (818, 818, (512, 512)),  # would have to be enlarged by more
        (410, 410, (512, 512)),
        (409, 409, None),
        (3000, 200, None),
    ],
)
def test_an_image_gets_the_largest_resolution_that_it_fills(
    width: int, height: int, expected: tuple[int, int] | None
) -> None:
    assert choose_bucket(width, height, (512, 1024), 1.25) == expected


def test_images_are_cropped_about_their_centre_and_not_distorted() -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (50, 0, 150, 100))
    found = pixels(fit_to_size(image, (64, 64)))
    assert found.shape == (3, 64, 64)
    blue = torch.tensor([0.0, 0, 1])[:, None, None].expand(3, 64, 60)
    torch.testing.assert_close(found[:, :, 2:-2], blue, rtol=0, atol=1.5 / 255)


def test_transparent_parts_are_white_and_exif_turns() -> None:
    clear = Image.new("RGBA", (4, 2), (9, 9, 9, 0))
    clear.getexif()[0x0112] = 6  # a camera held upright
    turned = upright(clear)
    assert turned.size == (2, 4)
    assert turned.getpixel((0, 0)) == (255, 255, 255)

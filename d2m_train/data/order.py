"""Order of samples: endless, determined by the seed, and any position can be computed without those before it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def sample_order(count: int, start: int, size: int, seed: Sequence[int]) -> list[int]:
    """Return positions start to start + size of an endless sequence of permutations of `count` samples."""
    turns = range(start // count, (start + size - 1) // count + 1)
    orders = {turn: _permutation(count, (*seed, turn)) for turn in turns}
    return [int(orders[place // count][place % count]) for place in range(start, start + size)]


@lru_cache(maxsize=128)
def _permutation(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


class BucketOrder:
    """Order of batches of one bucket each, in which every sample comes equally often however small its bucket.

    Each bucket has an endless sequence of permutations of its samples, cut into batches. An epoch is as long as one pass
    over all samples. In epoch e a bucket with n samples gives those of its batches that end within the first (e + 1) n
    positions of its sequence but not within the first e n. So the rest of an epoch goes into a batch of a later one and
    no sample is left out. A bucket smaller than a batch gives one every few epochs, with its samples several times.
    """

    def __init__(self, counts: Sequence[int], size: int, seed: int) -> None:
        """`counts`: number of samples of each bucket; `size`: samples in a batch."""
        if sum(counts) == 0:
            raise ValueError("no samples")
        self.counts, self.size, self.seed = counts, size, seed
        self._epoch = (-1, [(0, 0)])  # the latest one used

    def batch(self, index: int) -> tuple[int, list[int]]:
        """Return the bucket of batch `index`, and which of its samples the batch has."""
        epoch = self._epoch_of(index)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches_of(epoch))
        bucket, number = self._epoch[1][index - self._before(epoch)]
        return bucket, sample_order(self.counts[bucket], number * self.size, self.size, (self.seed, bucket))

    def _before(self, epoch: int) -> int:
        """Number of batches in all earlier epochs."""
        return sum(epoch * count // self.size for count in self.counts)

    def _epoch_of(self, index: int) -> int:
        """Return the last epoch that begins at batch `index` or before."""
        low, high = 0, (index + 1) * self.size  # an epoch has at least one sample, a batch `size`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= index else (low, middle)
        return low

    def _batches_of(self, epoch: int) -> list[tuple[int, int]]:
        """Return an epoch's batches as (bucket, number within the bucket's own sequence), shuffled."""
        batches = [
            (bucket, number)
            for bucket, count in enumerate(self.counts)
            for number in range(epoch * count // self.size, (epoch + 1) * count // self.size)
        ]
        order = np.random.default_rng((self.seed, len(self.counts), epoch)).permutation(len(batches))
        return [batches[place] for place in order]

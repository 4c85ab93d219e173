"""In which order samples come: endless, the same for the same seed, and every place of it known without those before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def sample_order(count: int, start: int, size: int, seed: Sequence[int]) -> list[int]:
    """Samples at places start … start + size of an endless sequence: permutations of `count`, one after the other."""
    turns = range(start // count, (start + size - 1) // count + 1)
    orders = {turn: _permutation(count, (*seed, turn)) for turn in turns}
    return [int(orders[place // count][place % count]) for place in range(start, start + size)]


@lru_cache(maxsize=128)
def _permutation(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


class BucketOrder:
    """Batches of one bucket each, so that every sample comes equally often however small its bucket.

    A bucket's samples stand in an endless sequence of permutations, cut into batches. In epoch e, which is as long as all
    samples together take, bucket b with n samples gives the batches that end within its first (e + 1) n places and did
    not within its first e n. What remains of an epoch so begins a batch of a later one: nothing is left out, and a bucket
    smaller than a batch gives one every few epochs, in which its samples stand several times.
    """

    def __init__(self, counts: Sequence[int], size: int, seed: int) -> None:
        """`counts`: samples of each bucket; `size`: of a batch."""
        if sum(counts) == 0:
            raise ValueError("no samples")
        self.counts, self.size, self.seed = counts, size, seed
        self._epoch = (-1, [(0, 0)])  # the one last asked for

    def batch(self, index: int) -> tuple[int, list[int]]:
        """Of batch number `index`: the bucket, and which of its samples."""
        epoch = self._epoch_of(index)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches_of(epoch))
        bucket, number = self._epoch[1][index - self._before(epoch)]
        return bucket, sample_order(self.counts[bucket], number * self.size, self.size, (self.seed, bucket))

    def _before(self, epoch: int) -> int:
        """Batches of all earlier epochs."""
        return sum(epoch * count // self.size for count in self.counts)

    def _epoch_of(self, index: int) -> int:
        """The last epoch that begins at `index` or before."""
        low, high = (
            0,
            (index + 1) * self.size,
        )  # every full batch takes `size` samples, of which an epoch has one at least
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= index else (low, middle)
        return low

    def _batches_of(self, epoch: int) -> list[tuple[int, int]]:
        """Its batches as (bucket, number within the bucket's own sequence), shuffled."""
        batches = [
            (bucket, number)
            for bucket, count in enumerate(self.counts)
            for number in range(epoch * count // self.size, (epoch + 1) * count // self.size)
        ]
        order = np.random.default_rng((self.seed, len(self.counts), epoch)).permutation(len(batches))
        return [batches[place] for place in order]

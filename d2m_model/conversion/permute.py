"""Reordering of neurons in pieces: what permute_neurons of layout.py does, for a weight too large to be held twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_PIECE = 2 << 20  # bytes; fits a processor's cache

_AS_INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # numpy knows neither bfloat16 nor float8


def permuted_pieces(tensor: Tensor, axis: int, first: int, order: Tensor) -> Iterator[Tensor]:
    """`tensor` with its neurons along `axis`, from `first` on, in `order`, as consecutive parts along the first axis.

    A part is valid until the next is asked for: all lie in one buffer.
    """
    source = tensor.detach().view(_AS_INTEGERS[tensor.dtype.itemsize]).numpy()
    index = np.arange(source.shape[axis])  # what stays where it is, is gathered too: as fast as copying
    index[first : first + len(order)] = first + order.numpy()
    count = max(1, _PIECE // source[:1].nbytes)
    buffer = np.empty((min(count, len(source)), *source.shape[1:]), source.dtype)
    for begin in range(0, len(source), count):
        part = slice(begin, begin + count)
        piece = buffer[: len(source[part])]
        if axis == 0:
            np.take(source, index[part], axis=0, out=piece, mode="clip")  # mode `raise` would buffer `out`
        else:
            np.take(source[part], index, axis=1, out=piece, mode="clip")
        yield torch.from_numpy(piece).view(tensor.dtype)

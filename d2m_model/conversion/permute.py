"""layout.permute_neurons in pieces, for a weight too large to be in memory twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_PIECE = 2 << 20  # bytes; fits into a processor's cache

_AS_INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # numpy has neither bfloat16 nor float8


def permuted_pieces(tensor: Tensor, axis: int, first: int, order: Tensor) -> Iterator[Tensor]:
    """Yield `tensor` with its neurons along `axis`, from `first` on, in `order`, as parts along the first axis.

    All parts share one buffer: a part is valid until the next is requested.
    """
    source = tensor.detach().view(_AS_INTEGERS[tensor.dtype.itemsize]).numpy()
    index = np.arange(source.shape[axis])  # gathers unmoved elements too, which is as fast as copying
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

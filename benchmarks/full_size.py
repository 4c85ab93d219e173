"""A dense FLUX.1 file of full size with random weights, for measurements that depend only on the size.

python -m benchmarks.full_size flux1-dev-random.safetensors              23.8 GB, bfloat16
python -m benchmarks.full_size small.safetensors --layers 3 6            fewer double and single blocks
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2m_model.config import FluxDims
from d2m_model.keys import dense_shapes
from d2m_model.tensor_writer import TensorWriter
from d2m_train.teacher.known_flux import FLUX_DEV

_PIECE = 1 << 22  # elements generated at a time
_METADATA = {"modelspec.title": "FLUX.1 with random weights", "modelspec.license": "none: random numbers"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38), metavar=("DOUBLE", "SINGLE"))
    args = parser.parse_args(arguments)
    write_random(args.file, flux_of(*args.layers))
    print(f"{args.file}: {args.file.stat().st_size:,} bytes")
    return 0


def flux_of(doubles: int, singles: int) -> FluxDims:
    """Return the dimensions of FLUX.1 dev with other depths."""
    return FLUX_DEV.with_depths(double=doubles, single=singles)


def weight_bytes(dims: FluxDims) -> int:
    """Return the size of a dense FLUX's weights in bfloat16, in bytes."""
    return sum(2 * prod(shape) for shape in dense_shapes(dims).values())


def write_random(path: Path, dims: FluxDims) -> None:
    """Write weights of ±0.008 to ±0.12, sorted by name like published files."""
    generator = np.random.Generator(np.random.SFC64(0))
    specs = {name: (torch.bfloat16, shape) for name, shape in sorted(dense_shapes(dims).items())}
    with TensorWriter(path, specs, _METADATA) as writer:
        for name, (_, shape) in specs.items():
            writer.put_pieces(name, _random(generator, shape))
        writer.finish(_METADATA)


def _random(generator: np.random.Generator, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield pieces of a weight with random sign, mantissa and two bits of the exponent.

    This is ten times as fast as drawing from a normal distribution.
    """
    rows = max(1, _PIECE // prod(shape[1:]))
    for first in range(0, shape[0], rows):
        size = (min(rows, shape[0] - first), *shape[1:])
        bits = generator.integers(0, 1 << 16, size, np.uint16)
        bits &= 0x81FF
        bits |= 0x3C00
        yield torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())

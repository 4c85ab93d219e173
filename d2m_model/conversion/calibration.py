"""A calibration: measurements of the dense model for a conversion without training, stored in parts.

It has the importance of neurons (Eq. 6), some inputs of every FFN, conditioning vectors, and the changes that blocks make
to their input (Fig. 3). Each part is a file, written atomically: an interrupted calibration can be resumed, and nothing
stays in memory. d2m_train records the parts with a model in diffusers, the nodes with a model in ComfyUI (recorder.py).

Tensors of a part:
  importance.<ffn> [N]   optional
  inputs.<ffn> [n, H]
  silu_vec [n, H]
  vec [n, H]             of the part's samples, in their order; so are the following two, for blocks of groups
  mean.<block> [n, H]    mob.mean_tokens of the block's input
  change.<block> [n, 2]  mean squares of output - input, over all tokens and over the image tokens
  before.<block>.<stream> [n, H], stream_change.<block>.<stream> [n, H]  tokens of a stream, and output - input of them
  tokens.<block>.<stream> [B]  how many of these tokens are of each sample

Shapes: B, n samples (n also tokens), H hidden size, N neurons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import BlockGroup
from ..tensor_file import TensorFile
from ..tensor_writer import write_tensors
from .adaln import VecMoments
from .block_routers import BlockChange, GroupObservations

_KEY = "calibration"  # of the metadata that tells which calibration a part belongs to
_FEW_SHARE = 0.2  # see VecMoments.widened
GUIDANCE = (1.5, 5.0)  # range of guidances for a guidance-distilled teacher


@dataclass(kw_only=True, slots=True, frozen=True)
class StreamChange:
    """How a block changes some tokens of a stream: its inputs, and outputs - inputs; sample after sample.

    tokens_B  int64: how many of them are of each sample
    """

    before_nH: Tensor
    change_nH: Tensor
    tokens_B: Tensor


class Calibration:
    """A finished calibration. Tensors are read from its files when they are used. `few`: it has only a few prompts."""

    def __init__(self, files: Sequence[Path], *, few: bool = False) -> None:
        self.files, self.few = files, few

    @property
    def losses(self) -> list[float]:
        """The loss of each part, if losses were measured."""
        return [part_metadata(file)["loss"] for file in self.files]

    def importance(self, ffn: str) -> Tensor:
        """Return the importance of Eq. 6, summed over the parts: float32 [N]."""
        return torch.stack(self._parts(f"importance.{ffn}")).double().sum(0).float()

    def inputs(self, ffn: str) -> Tensor:
        """Return inputs of an FFN without padding, [n, H]."""
        return torch.cat(self._parts(f"inputs.{ffn}"))

    def moments(self) -> VecMoments:
        """Return the moments of silu(vec)."""
        moments = VecMoments.of(torch.cat(self._parts("silu_vec")))
        return moments.widened(_FEW_SHARE) if self.few else moments

    def block_change(self, block: str) -> BlockChange:
        """Return the mean change by a block (BFL name) over all samples."""
        all_tokens, image = torch.cat(self._parts(f"change.{block}")).mean(0).tolist()
        return BlockChange(mse=all_tokens, image_mse=image)

    def group(self, group: BlockGroup) -> GroupObservations:
        """Return a router's inputs and the changes by the group's blocks, per sample."""
        changes = [torch.cat(self._parts(f"change.{block.name}"))[:, 1].sqrt() for block in group.members]
        return GroupObservations(
            x_mean_nH=torch.cat(self._parts(f"mean.{group.members[0].name}")),
            vec_nH=torch.cat(self._parts("vec")),
            change_nM=torch.stack(changes, dim=1),
        )

    def stream_change(self, block: str, stream: str) -> StreamChange:
        """Return how a block changes some tokens of a stream."""
        return StreamChange(
            before_nH=torch.cat(self._parts(f"before.{block}.{stream}")),
            change_nH=torch.cat(self._parts(f"stream_change.{block}.{stream}")),
            tokens_B=torch.cat(self._parts(f"tokens.{block}.{stream}")),
        )

    def _parts(self, name: str) -> list[Tensor]:
        parts = []
        for file in self.files:
            with TensorFile(file) as stored:
                parts.append(stored.tensor(name).clone())
        return parts


def write_part(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a part's file atomically; `about` becomes its metadata."""
    announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(file, announced, tensors.__getitem__, {_KEY: json.dumps(about)})


def part_metadata(file: Path) -> dict:
    """Return what `write_part` got as `about`; empty for another file. Raises CheckpointError for a damaged file."""
    with TensorFile(file) as stored:
        about: dict = json.loads(stored.metadata.get(_KEY, "null")) or {}
        return about

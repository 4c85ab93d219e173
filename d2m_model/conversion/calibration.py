"""What a conversion without training wants to know of the dense model, gathered in parts.

Neurons' importance (Eq. 6), some of every FFN's inputs, conditioning vectors, and what blocks do to their input (Fig. 3).
Each part is a file of its own, written whole or not at all: an interrupted calibration can go on where it stopped, and
none is held in memory. Who gathers them runs the model: d2m_train in diffusers, nodes in ComfyUI.

Of a part: `importance.<ffn>` [N], optional; `inputs.<ffn>` [n, H]; `silu_vec` [n, H]; and of its samples in their order
`vec` [n, H], `mean.<block>` [n, H] (mob.mean_tokens of the block's input) and `change.<block>` [n, 2], the mean squares of
output - input over all tokens and over the image's. Blocks are wanted of block groups alone.

Shapes: H hidden size, N neurons, n samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import BlockGroup
from ..tensor_file import TensorFile
from ..tensor_writer import write_tensors
from .adaln import VecMoments
from .block_routers import BlockChange, GroupObservations

_KEY = "calibration"  # of a part's metadata: whose it is
_FEW_SHARE = 0.2  # see VecMoments.widened
GUIDANCE = (1.5, 5.0)  # a guidance-distilled teacher is asked with values of this range


class Calibration:
    """A finished calibration in its files; tensors are read when they are asked for. `few`: of a handful of prompts."""

    def __init__(self, files: Sequence[Path], *, few: bool = False) -> None:
        self.files, self.few = files, few

    @property
    def losses(self) -> list[float]:
        """Of each part, where one was measured."""
        return [part_metadata(file)["loss"] for file in self.files]

    def importance(self, ffn: str) -> Tensor:
        """Eq. 6 summed over the parts, float32 [N]."""
        return torch.stack(self._parts(f"importance.{ffn}")).double().sum(0).float()

    def inputs(self, ffn: str) -> Tensor:
        """[n, H] inputs of an FFN, padding left out."""
        return torch.cat(self._parts(f"inputs.{ffn}"))

    def moments(self) -> VecMoments:
        """Of silu(vec)."""
        moments = VecMoments.of(torch.cat(self._parts("silu_vec")))
        return moments.widened(_FEW_SHARE) if self.few else moments

    def block_change(self, block: str) -> BlockChange:
        """Mean change of a block (by BFL name) over all samples."""
        all_tokens, image = torch.cat(self._parts(f"change.{block}")).mean(0).tolist()
        return BlockChange(mse=all_tokens, image_mse=image)

    def group(self, group: BlockGroup) -> GroupObservations:
        """What a group's router would see of every sample, and what its blocks did."""
        changes = [torch.cat(self._parts(f"change.{block.name}"))[:, 1].sqrt() for block in group.members]
        return GroupObservations(
            x_mean_nH=torch.cat(self._parts(f"mean.{group.members[0].name}")),
            vec_nH=torch.cat(self._parts("vec")),
            change_nM=torch.stack(changes, dim=1),
        )

    def _parts(self, name: str) -> list[Tensor]:
        parts = []
        for file in self.files:
            with TensorFile(file) as stored:
                parts.append(stored.tensor(name).clone())
        return parts


def write_part(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(file, announced, tensors.__getitem__, {_KEY: json.dumps(about)})


def part_metadata(file: Path) -> dict:
    """What `write_part` was told `about` it; empty of another file. Raises CheckpointError for a damaged one."""
    with TensorFile(file) as stored:
        found: dict = json.loads(stored.metadata.get(_KEY, "null")) or {}
        return found

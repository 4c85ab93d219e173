"""Memory of a training stage on a GPU, by part: weights, gradients, optimizer state, average, teacher.

Bytes are counted from the student's parameters, full or as one of several GPUs stores them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from d2m_model.blocks import Block
from d2m_model.config import FluxDims
from d2m_model.cost import Tokens
from d2m_model.keys import diffusers_shapes

from ..blockwise.part import Part
from ..parallel.parameters import shard_axis
from ..run_config import RunConfig
from ..teacher.frozen import NF4_BLOCK, NF4_SCALER_BLOCK
from ..training.parameter_sizes import ParameterSize, optimizer_bytes
from .activations import Activations

Strategy = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]


def _block_name(parameter: str) -> str:
    """Return the name of a parameter's block in diffusers' style; the empty string outside of blocks."""
    block = Block.parse(parameter)
    return "" if block is None else block.diffusers_name


def shared_memory(
    run: RunConfig, weights: Sequence[ParameterSize], buffers: int, processes: int, strategy: Strategy
) -> dict[str, int]:
    """Memory that depends on the strategy: weights, gradients, optimizer state, average, and the strategy's own buffers.

    The optimizer's step takes nothing beside its state: see optimizers.new_optimizer.
    """
    full = list(weights)
    trained = [weight for weight in full if weight.trained]
    parts: list[ParameterSize] = full
    if strategy == "fsdp2":
        parts = [weight.shard(processes) for weight in full]
    trained_parts = [weight for weight in parts if weight.trained]
    size = {"student's weights": sum(weight.nbytes for weight in parts) + buffers}
    size["gradients"] = sum(weight.nbytes for weight in trained_parts)
    size["optimizer"] = optimizer_bytes(run, trained_parts)
    if strategy in ("zero2", "zero3"):
        share = -(-sum(weight.count for weight in trained) // processes)
        size["gradients"] = -(-size["gradients"] // processes)
        size["optimizer"] = 12 * share  # master weights and two moments, float32
        if strategy == "zero3":
            size["student's weights"] = -(-size["student's weights"] // processes)
    if run.training.ema is not None:
        size["average"] = sum(weight.nbytes for weight in trained_parts)
        if strategy == "zero3":
            size["average"] = -(-size["average"] // processes)
    if strategy == "ddp":
        size["exchanged gradients"] = sum(weight.nbytes for weight in trained)
    elif strategy in ("fsdp2", "zero3"):
        size["gathered blocks"] = _gathered(run, full, processes)
    return size


def loading_memory(weights: Sequence[ParameterSize], strategy: Strategy) -> int:
    """Bytes of the student on a GPU while it is loaded, where they are more than those that it keeps; else 0.

    DeepSpeed's stage 3 shards a student that each GPU has whole. FSDP2 shards it before it has values.
    """
    return sum(weight.nbytes for weight in weights) if strategy == "zero3" else 0


@dataclass(slots=True)
class _Gathered:
    """Bytes of a block's weights and gradients while FSDP2 has them whole, with the padding of uneven shards."""

    weights: int = 0
    rearranged: int = 0  # weights sharded along another axis than the first: gathered into a second copy
    gradients: int = 0
    reduced: int = 0  # the buffer that gradients are reduced from

    @property
    def most(self) -> int:
        """The maximum of three moments: entering a block's forward pass, entering its backward pass, and leaving that.

        Entering the forward pass: the block before as it was gathered, this block as it is gathered, and its weights made
        from that. In the backward pass the buffer of the block before is still being reduced. Leaving it: weights and
        gradients of this block, and the next block as it is gathered.
        """
        return max(
            3 * self.weights + self.rearranged,
            2 * self.weights + self.rearranged + self.reduced,
            2 * self.weights + self.gradients + self.reduced,
        )


def _gathered(run: RunConfig, weights: Sequence[ParameterSize], processes: int) -> int:
    """Bytes of what is whole at once of a model sharded by block: the rest of the model, and the largest block's."""
    blocks: dict[str, _Gathered] = {}
    for weight in weights:
        block = blocks.setdefault(_block_name(weight.name), _Gathered())
        whole = weight.shard(processes).nbytes * processes
        block.weights += whole
        if shard_axis(weight.shape, processes) > 0:
            block.rearranged += whole
        if weight.trained:
            reduced = weight.dtype if run.training.mixed_precision == "no" else torch.float32
            block.gradients += weight.nbytes
            block.reduced += whole // weight.dtype.itemsize * reduced.itemsize
    outside = blocks.pop("", _Gathered())
    return outside.weights + max([outside.gradients + outside.reduced, *(block.most for block in blocks.values())])


def blockwise_memory(
    run: RunConfig,
    teacher: FluxDims,
    parts: Sequence[Part],
    weights: Sequence[ParameterSize],
    kept: Activations,
    working: Activations,
    tokens: Tokens,
) -> dict[str, int]:
    """Memory of the largest part, since parts are trained one at a time. The teacher's block is freed before that.

    `kept`: activations that autograd keeps; `working`: the same without gradient checkpointing, which blockwise mode uses
    only in groups.
    """
    shared = sum(weight.nbytes for weight in weights if weight.name.startswith("adaln_in."))
    on_gpu, in_blocks = teacher_bytes(run, teacher, offload="none")
    elements = run.training.batch_size * tokens.joint * teacher.hidden_size
    student: torch.dtype = getattr(torch, run.student.dtype)
    sizes: list[dict[str, int]] = []
    for part in parts:
        own = [weight for weight in weights if part.has(weight.name)]
        trained = [weight for weight in own if weight.trained and not weight.name.startswith("adaln_in.")]
        blocks = [Block(part.kind, index).name for index in part.blocks]
        worked = [working.by_block.get(block, 0) for block in blocks]
        activations = sum(worked)
        if run.training.gradient_checkpointing and len(blocks) > 1:
            activations = sum(kept.by_block.get(block, 0) for block in blocks) + max(worked)
        size = {
            "student's weights": shared + sum(weight.nbytes for weight in own),
            "gradients": sum(weight.nbytes for weight in trained),
            "optimizer": optimizer_bytes(run, trained),
            "teacher's weights": on_gpu - in_blocks,
            "activations": activations,
            # Inputs and targets; both and the outputs in float32 for the comparison, and the errors.
            "block outputs to compare": elements * (2 * student.itemsize + 6 * 4),
        }
        if run.training.ema is not None:
            size["average"] = sum(weight.nbytes for weight in trained)
        sizes.append(size)
    return max(sizes, key=lambda size: sum(size.values()), default={})


def teacher_bytes(run: RunConfig, dims: FluxDims, offload: str | None = None) -> tuple[int, int]:
    """(bytes on the GPU, bytes of all blocks) of the frozen teacher. Offloaded blocks come one or two at a time."""
    dtype: torch.dtype = getattr(torch, run.teacher.dtype)
    outside, blocks = 0, dict[Block, int]()
    for name, shape in diffusers_shapes(dims).items():
        size = math.prod(shape) * dtype.itemsize
        block = Block.parse(name)
        if block is None:
            outside += size
            continue
        if len(shape) == 2 and run.teacher.quantise is not None:
            size = _quantised_bytes(run.teacher.quantise, shape, dtype)
        blocks[block] = blocks.get(block, 0) + size
    offload = run.teacher.offload if offload is None else offload
    on_gpu = {"none": sum(blocks.values()), "cpu": 2 * max(blocks.values()), "stream": max(blocks.values())}
    return outside + on_gpu[offload], sum(blocks.values())


def _quantised_bytes(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a weight as torchao stores it.

    8 bits: a float32 scale per row, for int8 also a zero point of one byte. nf4: a byte of scale per block, a scale per
    group of those, their mean, and a table of 16 values.
    """
    count = math.prod(shape)
    if form == "int8":
        return count + 5 * shape[0]
    if form == "fp8":
        return count + 4 * shape[0]
    blocks = count // NF4_BLOCK
    return count // 2 + blocks + (blocks // NF4_SCALER_BLOCK + 17) * dtype.itemsize

"""The frozen teacher: a dense FLUX.1, possibly quantised or offloaded.

`offload: cpu` keeps the blocks in the host's memory and copies each to the device for its forward. `offload: stream`
keeps them in the file: a block is mapped, or copied to the device, for its forward and freed afterwards, so that only
one block takes memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2m_model.blocks import DIFFUSERS_BLOCKS, Block, blocks_of
from d2m_model.hosts.diffusers import untrained_transformer
from d2m_model.keys import diffusers_sources, swap_halves
from d2m_model.teacher import DenseTeacher, open_teacher

from .. import UserError
from ..run_config import TeacherSection

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

NF4_BLOCK, NF4_SCALER_BLOCK = 64, 256  # weights per scale, scales per second-level scale


def open_frozen_teacher(
    section: TeacherSection, device: str | torch.device = "cpu", *, fused: Path | None = None
) -> FluxTransformer2DModel:
    """Open the teacher in eval mode, without trainable parameters.

    A section with LoRAs needs `fused`, the file that loras.fused_file writes. Weights are read and quantised block by
    block on the device, which never holds more than the finished teacher and one block. With `offload: stream` the file
    stays open as long as the model lives. Raises CheckpointError if the file is not a dense FLUX.1, UserError if a
    package is missing.
    """
    if bool(section.loras) != (fused is not None):
        raise ValueError("A teacher is read from a fused file if, and only if, it has LoRAs.")
    device, dtype = torch.device(device), getattr(torch, section.dtype)
    quantise = None if section.quantise is None else _quantiser(section.quantise)
    teacher = open_teacher(section.path if fused is None else fused)
    with torch.device("meta"):
        model = untrained_transformer(teacher.dims)
    model.eval().requires_grad_(False)
    weights = _Weights(teacher)
    weights.lend(model, weights.outside, device, dtype, keep=True)
    for block, names in weights.by_block(model):
        if section.offload == "stream":
            _stream(block, names, weights, device, dtype)
            continue
        weights.lend(block, names, device, dtype, keep=True)
        if quantise is not None:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    quantise(module)
        if section.offload == "cpu":
            block.to("cpu")
    if section.offload == "cpu":
        _offload(model, device)
    if section.offload != "stream":
        teacher.close()
    return model


# Weights


class _Weights:
    """A dense FLUX.1's tensors by BFL name, for the modules of diffusers' model."""

    def __init__(self, teacher: DenseTeacher) -> None:
        self._teacher = teacher
        self._sources = diffusers_sources(teacher.dims)
        self._blocks: dict[Block, list[str]] = {}
        self.outside: list[str] = []  # tensors outside of blocks
        for name in teacher.shapes:
            block = Block.parse(name)
            (self.outside if block is None else self._blocks.setdefault(block, [])).append(name)

    def by_block(self, model: FluxTransformer2DModel) -> Iterator[tuple[nn.Module, list[str]]]:
        """Yield every block and its tensors' names, in the order in which blocks run."""
        for block, module in blocks_of(model).items():
            yield module, self._blocks[block]

    def lend(
        self, root: nn.Module, names: Sequence[str], device: torch.device, dtype: torch.dtype, *, keep: bool
    ) -> None:
        """Set parameters of `root`, the model or a block, to these tensors.

        With `keep` they are copies. Otherwise tensors that need no conversion stay views of the mapped file.
        """
        for name in names:
            whole, source = self._teacher.tensor(name), self._sources[name]
            whole = swap_halves(whole) if source.swap else whole
            for part, rows in zip(source.names, whole.split(source.rows), strict=True):
                value = rows.to(device, dtype)
                copied = value is not rows or source.swap
                _set(root, part, value.clone() if keep and not copied else value)
            if keep:
                self._teacher.release(name)

    def take_back(self, root: nn.Module, names: Sequence[str]) -> None:
        """Remove these tensors from `root`, and their pages from memory."""
        for name in names:
            for part in self._sources[name].names:
                parameter = _find(root, part)
                _set(root, part, parameter.to("meta"))
            self._teacher.release(name)


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, parameter = name.rpartition(".")
    if not hasattr(root, DIFFUSERS_BLOCKS["double"]):  # `root` is a block: drop its list and index
        module = module.split(".", 2)[2]
    return root.get_submodule(module), parameter


def _find(root: nn.Module, name: str) -> Tensor:
    module, parameter = _owner(root, name)
    tensor: Tensor = getattr(module, parameter)
    return tensor


def _set(root: nn.Module, name: str, value: Tensor) -> None:
    module, parameter = _owner(root, name)
    setattr(module, parameter, nn.Parameter(value, requires_grad=False))


# Offloading


def _offload(model: FluxTransformer2DModel, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",  # the next block is copied during a block's forward
    )


class _Streamed:
    """Context manager that gives a block its weights from the file; nested uses share them."""

    def __init__(
        self, block: nn.Module, names: Sequence[str], weights: _Weights, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._block, self._names, self._weights = block, names, weights
        self._device, self._dtype = device, dtype
        self._entered = 0

    def __enter__(self) -> None:
        self._entered += 1
        if self._entered == 1:
            self._weights.lend(self._block, self._names, self._device, self._dtype, keep=False)

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._weights.take_back(self._block, self._names)


def _stream(
    block: nn.Module, names: Sequence[str], weights: _Weights, device: torch.device, dtype: torch.dtype
) -> None:
    streamed = _Streamed(block, names, weights, device, dtype)
    block.streamed = streamed  # type: ignore[assignment]
    block.register_forward_pre_hook(lambda *_: streamed.__enter__())
    block.register_forward_hook(lambda *_: streamed.__exit__(), always_call=True)


def weights_on_device(block: nn.Module) -> AbstractContextManager[None]:
    """Keep a block of a teacher with `offload: stream` on the device during the `with`, for many forwards."""
    streamed: _Streamed = block.streamed  # type: ignore[assignment]
    return streamed


# Quantisation


def _quantiser(form: str) -> Callable[[nn.Linear], object]:
    """Return a function that quantises a linear layer's weight: to 8 bits with a scale for each row, or to nf4."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_, to_nf4
    except ModuleNotFoundError as error:
        raise UserError(
            f"teacher.quantise={form} needs {error.name}: pip install 'dense2moe-flux[train,quantise]'."
        ) from None

    def nf4(layer: nn.Linear) -> None:
        weight = to_nf4(layer.weight.data, NF4_BLOCK, NF4_SCALER_BLOCK)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    if form == "nf4":
        return nf4
    config = {"fp8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}[form]()
    return lambda layer: quantize_(layer, config)

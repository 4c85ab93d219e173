"""The frozen teacher: a dense FLUX.1, with LoRAs fused into it, quantised, and held where there is room for it.

`offload: cpu` keeps the blocks in the host's memory and lends each to the device for its forward. `offload: stream`
keeps them in the file: a block is mapped, or copied to the device, for its forward and let go after it, so that the
memory is a block's and not the model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2m_model.blocks import DIFFUSERS_BLOCKS, Block, blocks_of
from d2m_model.conversion.convert import refuse_same_file
from d2m_model.hosts.diffusers import untrained_transformer
from d2m_model.keys import diffusers_sources, swap_halves
from d2m_model.teacher import DenseTeacher, open_teacher
from d2m_model.tensor_file import TensorFile
from d2m_model.tensor_writer import write_tensors

from .. import UserError
from ..run_config import Lora, TeacherSection
from .loras import LoraDeltas, lora_files

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_IDENTITY = "d2m_fused"  # of a fused file's metadata: what it was made of
NF4_BLOCK, NF4_SCALER_BLOCK = 64, 256  # weights that share a scale, scales that share one of their own
_TITLE = "modelspec.title"


def open_frozen_teacher(
    section: TeacherSection, device: str | torch.device = "cpu", *, fused: Path | None = None
) -> FluxTransformer2DModel:
    """The teacher, to be asked without gradients: eval, nothing of it trainable.

    A section with LoRAs needs `fused`, the file that `fused_file` has written. Weights are read and quantised block by
    block, on the device: at no time does it hold more than the teacher as it will be and one block besides. With
    `offload: stream` the file stays open as long as the model lives.
    Raises CheckpointError if the file is no dense FLUX.1, UserError if a package is missing.
    """
    if bool(section.loras) != (fused is not None):
        raise ValueError("A teacher with LoRAs is read from its fused file, and only that.")
    device, dtype = torch.device(device), getattr(torch, section.dtype)
    quantise = None if section.quantise is None else _quantiser(section.quantise)
    teacher = open_teacher(section.path if fused is None else fused)
    with torch.device("meta"):
        model = untrained_transformer(teacher.dims)
    model.eval().requires_grad_(False)
    weights = _Weights(teacher)
    weights.lend(model, weights.outside, device, dtype, keep=True)
    for block, names in weights.of_blocks(model):
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


# LoRAs


def fused_file(section: TeacherSection, path: Path, report: Callable[[str], object] = lambda note: None) -> Path:
    """Write the section's teacher with its LoRAs to `path`, a dense FLUX.1 in BFL names, from which the student is made.

    The teacher is read and written tensor by tensor, in the dtype in which it is read (bfloat16 for float8). A file that
    was made from the same files at the same strengths is kept. `report` gets a sentence for each LoRA. Raises UserError
    if `path` holds anything else or a LoRA does not fit; CheckpointError as open_teacher and the writer do.
    """
    with open_teacher(section.path) as teacher:
        refuse_same_file([*teacher.files, *(lora_files(lora.path)[0] for lora in section.loras)], path, "this is read")
        deltas = LoraDeltas(teacher.dims, [(lora.path, lora.strength) for lora in section.loras])
        identity = _identity(teacher, section.loras)
        if path.exists():
            _check_made_of(path, identity)
            return path
        for note in deltas.notes:
            report(note)

        def produce(name: str) -> Tensor:
            tensor = deltas.fused(name, teacher.tensor(name))
            teacher.release(name)
            return tensor

        metadata = {key: value for key, value in teacher.metadata.items() if key.startswith("modelspec.")}
        names = " + ".join(lora.path.stem for lora in section.loras)
        metadata[_TITLE] = f"{metadata.get(_TITLE, section.path.stem)} + {names}"
        metadata[_IDENTITY] = json.dumps(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(
            path, {name: (teacher.dtypes[name], shape) for name, shape in teacher.shapes.items()}, produce, metadata
        )
    return path


def _identity(teacher: DenseTeacher, loras: Sequence[Lora]) -> dict[str, Any]:
    def state(file: Path) -> str:
        about = file.stat()
        return f"{file.absolute()}, {about.st_size} bytes, modified {about.st_mtime_ns}"

    def lora_state(lora: Lora) -> dict[str, Any]:
        weights, config = lora_files(lora.path)
        peft = {} if config is None else {"peft_config": state(config)}
        return {"file": state(weights), "strength": lora.strength} | peft

    return {"teacher": [state(file) for file in teacher.files], "loras": [lora_state(lora) for lora in loras]}


def _check_made_of(path: Path, identity: Mapping[str, Any]) -> None:
    with TensorFile(path) as file:
        found = json.loads(file.metadata.get(_IDENTITY, "{}"))
    if found != identity:
        differs = [key for key in identity if found.get(key) != identity[key]]
        what = f"was made of other {' and '.join(differs)}" if found else "is no fused teacher"
        raise UserError(f"{path}: {what}. Give the same ones to go on with it, or delete it. Nothing was changed.")


# Weights


class _Weights:
    """A dense FLUX.1's tensors for the modules of diffusers' model, by BFL name."""

    def __init__(self, teacher: DenseTeacher) -> None:
        self._teacher = teacher
        self._sources = diffusers_sources(teacher.dims)
        self._blocks: dict[Block, list[str]] = {}
        self.outside: list[str] = []  # of no block
        for name in teacher.shapes:
            block = Block.parse(name)
            (self.outside if block is None else self._blocks.setdefault(block, [])).append(name)

    def of_blocks(self, model: FluxTransformer2DModel) -> Iterator[tuple[nn.Module, list[str]]]:
        """Every block, in the order in which they run, and its tensors."""
        for block, module in blocks_of(model).items():
            yield module, self._blocks[block]

    def lend(
        self, root: nn.Module, names: Sequence[str], device: torch.device, dtype: torch.dtype, *, keep: bool
    ) -> None:
        """Give `root` (the model, or a block) these tensors as parameters; to `keep`, they are copied.

        Otherwise those that need no other dtype, device or order stay views of the mapped file.
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
        """Leave `root` without these tensors, and the memory without the pages of the file."""
        for name in names:
            for part in self._sources[name].names:
                parameter = _find(root, part)
                _set(root, part, parameter.to("meta"))
            self._teacher.release(name)


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, parameter = name.rpartition(".")
    if not hasattr(root, DIFFUSERS_BLOCKS["double"]):  # a block: without its list and index
        module = module.split(".", 2)[2]
    return root.get_submodule(module), parameter


def _find(root: nn.Module, name: str) -> Tensor:
    module, parameter = _owner(root, name)
    found: Tensor = getattr(module, parameter)
    return found


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
        use_stream=device.type == "cuda",  # the next block travels while one computes
    )


class _Streamed:
    """A block's weights in a file, which it has during each forward, or as long as a `with` of this lasts."""

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
    """A block of a teacher with `offload: stream` keeps its weights on the device during the `with`, for many forwards."""
    streamed: _Streamed = block.streamed  # type: ignore[assignment]
    return streamed


# Quantisation


def _quantiser(form: str) -> Callable[[nn.Linear], object]:
    """Replaces a linear layer's weight by a quantised one: 8 bits with a scale for each row, or nf4."""
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

"""A dense FLUX.1 in any form in which it is published, read tensor by tensor in BFL names.

It may be one file, or shards with their index; alone or inside a full checkpoint; in BFL's or diffusers' names; bfloat16,
float16 or float32; or float8, plain or scaled in either of ComfyUI's ways, which becomes bfloat16. Other forms are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .checkpoint import check_dense
from .foreign import read_json
from .keys import DIFFUSERS, DiffusersSource, dense_shapes, diffusers_sources, landmarks_of, swap_halves
from .quantised import description_of, is_companion, quantised_layers
from .tensor_file import FLOAT8, CheckpointError, Shape, TensorFile, is_finite

_FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # in ComfyUI's comfy_quant
_MAX_NAME = 255  # bytes of a file's name
_CHUNK = 1 << 22  # elements dequantised at a time

_SHARD = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\b.*\.safetensors$")  # of several; one of one is a whole model
_STANDARD = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors")  # diffusers'
_SCALES = ("weight_scale", "scale_weight")  # ComfyUI's present name and its former one
_MARKER = "scaled_fp8"
_TAKE_INSTEAD = "take the model's bfloat16, float16 or float8 version"

# Ends of tensor names that show an unsupported quantisation.
_QUANTISATIONS = (
    (r"quant_state\.bitsandbytes__|\.(nested_)?(absmax|quant_map)$", "bitsandbytes (nf4, fp4 or int8)"),
    (r"\.(qweight|qzeros|wscales|smooth_factor)$", "GPTQ, AWQ or SVDQuant"),
    (r"\.weight_scale_2$", "nvfp4"),
    (r"\.pre_quant_scale$", "smoothed (pre_quant_scale)"),
    (r"\.weight\._(data|scale)$", "Quanto"),
)


@dataclass(kw_only=True, slots=True, frozen=True)
class _Stored:
    """A tensor in one of the files. `scale` names the tensor with its scale, if it is scaled float8."""

    file: TensorFile
    name: str
    begin: int  # bytes, counted as if the files were concatenated
    end: int
    scale: str | None = None

    @property
    def shape(self) -> Shape:
        return self.file.shapes[self.name]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what `read` returns."""
        dtype = self.file.dtypes[self.name]
        return torch.bfloat16 if dtype in FLOAT8 else dtype

    def read(self) -> Tensor:
        tensor = self.file.tensor(self.name)
        if tensor.dtype not in FLOAT8:
            return tensor
        scale = None if self.scale is None else _per_row(self.file.tensor(self.scale).float(), self.shape)
        return dequantise_float8(tensor, scale)


class DenseTeacher:
    """An open dense FLUX.1, checked by its headers. Tensors are memory-mapped: none is kept in memory.

    shapes, dtypes  by BFL name, in the order of the files; dtypes are those that `tensor` returns
    dims            the dimensions that the shapes show
    metadata        the metadata of the header (of the first shard that has any)
    files, size     every file that is read, index and shards in order, and their bytes in total
    notes           sentences for the user on what is done to the weights, if anything
    Raises CheckpointError for another model, an incomplete one, or an unsupported quantisation.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        index, paths = _files_of(self.path)
        self.files: tuple[Path, ...] = (*([index] if index else []), *paths)
        with ExitStack() as stack:
            files = [stack.enter_context(TensorFile(path)) for path in paths]
            try:
                self._read_headers(files, 0 if index is None else index.stat().st_size)
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {error}") from None
            self._close = stack.pop_all()

    def _read_headers(self, files: list[TensorFile], position: int) -> None:
        """Read all headers. `position` is the first byte of the first file if all `files` were concatenated."""
        _refuse_quantised(files)
        self.metadata = next((file.metadata for file in files if file.metadata), {})
        stored: dict[str, _Stored] = {}
        for file in files:
            for name in file.shapes:
                if name in stored:
                    raise CheckpointError(f"{name} is in {stored[name].file.path.name} and in {file.path.name}.")
                begin, end = (position + offset for offset in file.span(name))
                scale = _scale_of(file, name)
                stored[name] = _Stored(file=file, name=name, begin=begin, end=end, scale=scale)
            position += file.size
        self.size = position
        weights = {
            name: tensor for name, tensor in stored.items() if name != _MARKER and not is_companion(name, stored)
        }
        self.dims = check_dense(
            {name: tensor.shape for name, tensor in weights.items()},
            {name: tensor.dtype for name, tensor in weights.items()},
        )
        for tensor in weights.values():
            if tensor.scale is not None:
                _per_row(tensor.file.tensor(tensor.scale), tensor.shape)
        self.notes = _notes(files, weights)

        self._parts: dict[str, tuple[_Stored, ...]]
        dense = dense_shapes(self.dims)
        self._swapped: set[str] = set()
        self._finite: set[str] = set()  # names of tensors that were looked at
        if landmarks_of(weights) is DIFFUSERS:
            sources = diffusers_sources(self.dims)
            self._swapped = {name for name, source in sources.items() if source.swap}
        else:
            sources = {name: DiffusersSource(names=(name,), rows=shape[:1]) for name, shape in dense.items()}
        parts = {name: tuple(weights[part] for part in source.names) for name, source in sources.items()}
        self._parts = dict(sorted(parts.items(), key=lambda item: item[1][0].begin))
        self.shapes = {name: dense[name] for name in self._parts}
        self.dtypes = {
            name: reduce(torch.promote_types, (part.dtype for part in parts)) for name, parts in self._parts.items()
        }

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its BFL name: a read-only view of the mapped file, or a new tensor if it has to be computed.

        Raises CheckpointError for NaN or infinity, when the tensor is read for the first time.
        """
        parts = self._parts[name]
        tensor = parts[0].read() if len(parts) == 1 else torch.cat([part.read() for part in parts])
        if name not in self._finite:
            if not is_finite(tensor):
                part = next(part for part in parts if not is_finite(part.read()))
                raise CheckpointError(
                    f"{part.file.path}: {part.name} has NaN or infinite values; a model with them makes no images. "
                    "Download the file again, or take another."
                )
            self._finite.add(name)
        return swap_halves(tensor) if name in self._swapped else tensor

    def check_values(self) -> None:
        """Read every tensor once. Raises CheckpointError for NaN or infinity, naming file and tensor."""
        for name in self._parts:
            self.tensor(name)
            self.release(name)

    def span(self, name: str) -> tuple[int, int]:
        """Return a tensor's first and last byte if all `files` were concatenated. Other tensors may be in between."""
        parts = self._parts[name]
        return min(part.begin for part in parts), max(part.end for part in parts)

    def release(self, name: str) -> None:
        """Free the memory pages of a tensor that has been read."""
        for part in self._parts[name]:
            part.file.release(part.name)

    def close(self) -> None:
        self._close.close()

    def __enter__(self) -> DenseTeacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_teacher(path: str | os.PathLike[str]) -> DenseTeacher:
    """Open a dense FLUX.1 by its .safetensors, a shard, the shards' index, its folder or a diffusers pipeline's folder.

    Raises CheckpointError as DenseTeacher does.
    """
    return DenseTeacher(path)


# Files


def _files_of(path: Path) -> tuple[Path | None, list[Path]]:
    """Return (index or None, the .safetensors files sorted by name)."""
    if path.is_dir():
        path = _in_folder(path / "transformer" if (path / "transformer").is_dir() else path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    if path.suffix == ".json":
        return path, _shards(path)
    for index in sorted(path.parent.glob("*.index*.json")):
        if path in (shards := _shards(index, missing_ok=True)) and len(shards) > 1:
            return index, _shards(index)
    if _SHARD.search(path.name):
        raise CheckpointError(
            f"{path}: this is one shard of several, and their index is not beside it "
            f"(a file named like {_SHARD.sub('.safetensors', path.name)}.index.json). Download it too."
        )
    return None, [path]


def _in_folder(folder: Path) -> Path:
    """Return the only model of a folder: a .safetensors, or the index of its shards."""
    for name in _STANDARD:
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.index*.json"))
    sharded = {shard for index in models for shard in _shards(index, missing_ok=True)}
    files = sorted(file for file in folder.glob("*.safetensors") if file not in sharded)
    models += [file for file in files if not _SHARD.search(file.name)] or files[:1]
    if len(models) == 1:
        return models[0]
    if not models:
        raise CheckpointError(f"{folder}: there is no .safetensors in this folder. Give the model's file.")
    names = ", ".join(file.name for file in models)
    raise CheckpointError(f"{folder}: this folder has several models. Give one of them: {names}.")


def _shards(index: Path, *, missing_ok: bool = False) -> list[Path]:
    """Return the shards that an index lists. Raises CheckpointError if one is missing, or for another file."""
    try:
        names = sorted(set(read_json(index.read_bytes())["weight_map"].values()))
        if not names or not all(map(_is_file_name, names)):
            raise ValueError
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        if missing_ok:
            return []
        raise CheckpointError(
            f"{index}: not the index of a sharded model; expected JSON with a weight_map from tensors to files beside it."
        ) from None
    shards = [index.parent / name for name in names]
    if missing := [shard.name for shard in shards if not missing_ok and not shard.is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}. "
            f"Download them into {index.parent}."
        )
    return shards


def _is_file_name(name: str) -> bool:
    return 0 < len(os.fsencode(name)) <= _MAX_NAME and os.path.basename(name) == name and "\0" not in name


# Quantisation


def _refuse_quantised(files: list[TensorFile]) -> None:
    for file in files:
        for name in file.shapes:
            for pattern, what in _QUANTISATIONS:
                if re.search(pattern, name):
                    raise CheckpointError(f"This FLUX is quantised: {what}, {name}. Not supported; {_TAKE_INSTEAD}.")
        for layer, form in _formats(file):
            if form not in _FLOAT8_FORMATS:
                raise CheckpointError(f"This FLUX is quantised: {form}, {layer}. Not supported; {_TAKE_INSTEAD}.")


def _formats(file: TensorFile) -> Iterator[tuple[str, str]]:
    """Yield (layer, ComfyUI's name of its quantisation) from the tensors comfy_quant and the header's metadata."""
    for layer, about in quantised_layers(file.metadata).items():
        if f"{layer}.weight" in file.shapes:  # others belong to a text encoder
            yield layer, about["format"]
    for name in file.shapes:
        if name.endswith(".comfy_quant"):
            yield name.removesuffix(".comfy_quant"), description_of(name, file.tensor(name))["format"]


def _scale_of(file: TensorFile, name: str) -> str | None:
    """Return the name of a float8 weight's scale, or None. Raises CheckpointError for a scale of another dtype's weight."""
    module, _, kind = name.rpartition(".")
    scale = next((f"{module}.{kind}" for kind in _SCALES if f"{module}.{kind}" in file.shapes), None)
    if kind != "weight" or scale is None:
        return None
    if file.dtypes[name] not in FLOAT8:
        dtype = str(file.dtypes[name]).removeprefix("torch.")
        raise CheckpointError(f"This FLUX is quantised: {dtype}, {name} with {scale}. Not supported; {_TAKE_INSTEAD}.")
    return scale


def _per_row(scale: Tensor, shape: Shape) -> Tensor:
    """Return the scale of a weight [O, I] as [1, 1] or [O, 1]. Raises CheckpointError for scales of blocks."""
    if scale.numel() == 1 or (shape and scale.shape[:1] == shape[:1] and scale.numel() == shape[0]):
        return scale.reshape(-1, 1)
    raise CheckpointError(
        f"This FLUX is quantised in blocks: scales {list(scale.shape)} for a weight {list(shape)}; expected one scale, "
        f"or one per row. Not supported; {_TAKE_INSTEAD}."
    )


def dequantise_float8(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """Convert float8 to bfloat16, which represents every float8. A `scale` is multiplied in float32 and rounded once."""
    if scale is None:
        return tensor.to(torch.bfloat16)
    result = torch.empty(tensor.shape, dtype=torch.bfloat16)
    rows = max(1, _CHUNK // tensor.shape[1])
    for first in range(0, tensor.shape[0], rows):
        part = slice(first, first + rows)
        result[part] = tensor[part].float().mul_(scale if len(scale) == 1 else scale[part])
    return result


def _notes(files: list[TensorFile], weights: dict[str, _Stored]) -> tuple[str, ...]:
    scaled = sum(tensor.scale is not None for tensor in weights.values())
    plain = sum(tensor.file.dtypes[tensor.name] in FLOAT8 for tensor in weights.values()) - scaled
    notes = []
    if landmarks_of(weights) is DIFFUSERS:
        notes.append("The teacher is in diffusers' key names; they become BFL's.")
    if len(files) > 1:
        notes.append(f"The teacher is in {len(files)} shards.")
    if scaled:
        notes.append(f"The teacher is scaled float8: {scaled} weights are dequantised to bfloat16.")
    if plain:
        notes.append(f"The teacher is float8: {plain} tensors become bfloat16, which holds the same values.")
    return tuple(notes)

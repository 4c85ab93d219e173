"""Fusing of LoRAs into a teacher. A LoRA is a .safetensors file or a folder that PEFT has saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m_model.config import FluxDims
from d2m_model.conversion.convert import refuse_same_file
from d2m_model.foreign import read_json
from d2m_model.lora_file import LoraChange, LoraContents, LoraError, read_lora
from d2m_model.teacher import DenseTeacher, open_teacher
from d2m_model.tensor_file import TensorFile
from d2m_model.tensor_writer import write_tensors

from .. import UserError
from ..fingerprint import fingerprint
from ..run_config import Lora, TeacherSection

_ROWS = 4096  # rows of a weight fused at a time
_SHOWN = 5  # keys named in an error
_IDENTITY = "d2m_fused"  # key of a fused file's metadata: what it was made from
_TITLE = "modelspec.title"
_METADATA = "lora_adapter_metadata"  # where diffusers stores PEFT's configuration
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    def lora_state(lora: Lora) -> dict[str, Any]:
        weights, config = lora_files(lora.path)
        peft = {} if config is None else {"peft_config": fingerprint([config])}
        return {"file": fingerprint([weights]), "strength": lora.strength} | peft

    return {"teacher": fingerprint(teacher.files), "loras": [lora_state(lora) for lora in loras]}


def _check_made_of(path: Path, identity: Mapping[str, Any]) -> None:
    with TensorFile(path) as file:
        try:
            stored = dict(read_json(file.metadata.get(_IDENTITY, "{}")))
        except (ValueError, TypeError):
            stored = {}
    if stored != identity:
        differs = [key for key in identity if stored.get(key) != identity[key]]
        problem = f"was made from other {' and '.join(differs)}" if stored else "is not a fused teacher"
        raise UserError(f"{path}: {problem}. Give the same ones to go on with it, or delete it. Nothing was changed.")


class LoraDeltas:
    """Changes that LoRA files at their strengths make to a dense FLUX.1 of `dims`.

    notes   a sentence for each file: number of changed layers, and of text encoder tensors that are left out
    names   BFL names of the tensors that change
    Raises UserError naming the keys of a file that is not a LoRA of this FLUX.1, or is another kind of adapter (DoRA, ...).
    """

    def __init__(self, dims: FluxDims, files: Sequence[tuple[Path, float]]) -> None:
        self._changes: dict[str, list[tuple[float, LoraChange]]] = {}
        self._norms: dict[str, list[tuple[float, Tensor]]] = {}  # interpolated towards
        notes = []
        for path, strength in files:
            contents = _read(path, dims)
            for change in contents.changes:
                self._changes.setdefault(change.name, []).append((strength * change.scale, change))
            for name, norm in contents.norms.items():
                self._norms.setdefault(name, []).append((strength, norm))
            notes.append(_note(path, strength, contents))
        self.notes = tuple(notes)

    @property
    def names(self) -> set[str]:
        return {*self._changes, *self._norms}

    def fused(self, name: str, tensor: Tensor) -> Tensor:
        """Return W + sum of strength scale up down, in float32 and rounded once; `tensor` itself if nothing changes."""
        if name not in self.names:
            return tensor
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for first in range(0, tensor.shape[0], _ROWS):
            rows = slice(first, min(first + _ROWS, tensor.shape[0]))
            part = tensor[rows].to(torch.float32, copy=True)  # the teacher's file is mapped read-only
            for scale, change in self._changes.get(name, ()):
                begin, end = max(rows.start, change.first), min(rows.stop, change.first + len(change.up))
                if begin < end:
                    up = change.up[begin - change.first : end - change.first].float()
                    product = up if change.down is None else up @ change.down.float()
                    part[begin - first : end - first] += scale * product
            result[rows] = part
        for strength, norm in self._norms.get(name, ()):
            result = torch.lerp(result.float(), norm.float(), strength).to(result.dtype)
        return result


def lora_files(path: Path) -> tuple[Path, Path | None]:
    """Return a LoRA's weights and its adapter_config.json, if it has one. Raises UserError if there are no weights."""
    weights = path / _PEFT_WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise UserError(f"{weights}: there is no such LoRA file.")
    config = weights.with_name(_PEFT_CONFIG)
    return weights, config if config.is_file() else None


def _read(path: Path, dims: FluxDims) -> LoraContents:
    weights, config_file = lora_files(path)
    with TensorFile(weights) as file:
        tensors = {name: file.tensor(name).clone() for name in file.shapes}
        metadata = file.metadata
    try:
        contents = read_lora(tensors, dims, _peft_config(weights, metadata, config_file))
    except LoraError as error:
        raise UserError(f"{path}: {error} Nothing was fused.") from None
    if contents.unknown or not contents.layers:
        unknown = sorted(contents.unknown)
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        reason = f"these keys are not part of this FLUX.1: {', '.join(unknown[:_SHOWN])}{more}"
        raise UserError(
            f"{path}: {reason if unknown else 'it has nothing for a FLUX.1'}. Expected a plain LoRA of this teacher. "
            "Nothing was fused."
        )
    return contents


def _peft_config(weights: Path, metadata: Mapping[str, str], config_file: Path | None) -> dict[str, Any]:
    """PEFT's LoraConfig from the file's header, else from adapter_config.json, else empty."""
    source: Path = weights
    try:
        if _METADATA in metadata or config_file is None:
            stored = read_json(metadata.get(_METADATA, "{}"))
        else:
            source = config_file
            stored = read_json(config_file.read_bytes())
        return {key.removeprefix("transformer."): value for key, value in stored.items()}
    except (ValueError, AttributeError):
        raise UserError(f"{source}: PEFT's configuration in it is not valid JSON; download the LoRA again.") from None


def _note(path: Path, strength: float, contents: LoraContents) -> str:
    note = f"{path.name} changes {contents.layers} layers at strength {strength:g}"
    left_out = contents.text_encoders
    return note + (f"; {left_out} tensors belong to a text encoder and are left out." if left_out else ".")

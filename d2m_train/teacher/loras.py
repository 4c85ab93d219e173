"""LoRAs as what they add to a dense FLUX.1's tensors, by BFL name, whatever the FLUX's depth.

Read are the spellings in use: diffusers' and PEFT's (lora_A, lora_B), kohya's (lora_unet_..., and the same with
diffusers' module names), ComfyUI's (diffusion_model. ahead of BFL's names), XLabs' processors, and BFL's own control
LoRAs with their biases and norms. diffusers has converters for most of them, which are not used here: they know one
depth and one width, and drop what they do not know without an error. The tests hold the two against each other.

Shapes: O outputs and I inputs of a linear layer, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m_model.config import FluxDims
from d2m_model.keys import dense_shapes, diffusers_sources, swap_halves
from d2m_model.tensor_file import TensorFile

from .. import UserError

ROWS = 4096  # of a weight, fused at a time
SHOWN = 5  # keys named in an error

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_transformer_")
_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.")
_ROLES = {
    "down": (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", ".down.weight"),
    "up": (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight", ".up.weight"),
    "alpha": (".alpha",),
    "bias": (".lora_B.bias",),
    "scale": (".query_norm.scale", ".key_norm.scale"),
}
_METADATA = "lora_adapter_metadata"  # what diffusers writes of PEFT's configuration


@dataclass(kw_only=True, slots=True, frozen=True)
class _Place:
    """Where a module's outputs lie in a BFL tensor; `swap` exchanges the halves first."""

    module: str
    first: int
    rows: int
    swap: bool = False


@dataclass(kw_only=True, slots=True)
class _Pair:
    """One module's part of one LoRA file, keys as the file spells them."""

    found: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


class LoraDeltas:
    """What LoRA files at their strengths add to a dense FLUX.1 of `dims`. Shapes: see the top of the file.

    notes   a sentence for each file: how many layers it changes, and what of it is a text encoder's and left out
    names   the BFL tensors that change
    Raises UserError naming the keys for what is no LoRA of this FLUX.1, or is of a kind that is not read (DoRA, say).
    """

    def __init__(self, dims: FluxDims, files: Sequence[tuple[Path, float]]) -> None:
        self._shapes = dense_shapes(dims)
        self._places = _places(dims)
        self._low_rank: dict[str, list[tuple[_Place, float, Tensor, Tensor]]] = {}
        self._vectors: dict[str, list[tuple[_Place, float, Tensor]]] = {}  # added
        self._norms: dict[str, list[tuple[float, Tensor]]] = {}  # moved towards
        self.notes = tuple(self._read(path, strength) for path, strength in files)

    @property
    def names(self) -> set[str]:
        return {*self._low_rank, *self._vectors, *self._norms}

    def fused(self, name: str, tensor: Tensor) -> Tensor:
        """W + sum of strength alpha / R up down, in float32 and rounded once; `tensor` itself where nothing changes."""
        if name not in self.names:
            return tensor
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for first in range(0, tensor.shape[0], ROWS):
            rows = slice(first, min(first + ROWS, tensor.shape[0]))
            part = tensor[rows].float()
            for place, scale, up_OR, down_RI in self._low_rank.get(name, ()):
                begin, end = max(rows.start, place.first), min(rows.stop, place.first + place.rows)
                if begin < end:
                    of_up = up_OR[begin - place.first : end - place.first].float()
                    part[begin - first : end - first] += scale * (of_up @ down_RI.float())
            result[rows] = part
        for place, scale, change in self._vectors.get(name, ()):
            whole = result.float()
            whole[place.first : place.first + place.rows] += scale * change.float()
            result = whole.to(result.dtype)
        for strength, norm in self._norms.get(name, ()):
            result = torch.lerp(result.float(), norm.float(), strength).to(result.dtype)
        return result

    def _read(self, path: Path, strength: float) -> str:
        if not path.is_file():
            raise UserError(f"{path}: there is no such LoRA file.")
        with TensorFile(path) as file:
            tensors = {name: file.tensor(name).clone() for name in file.shapes}
            scaling = _Scaling(file.metadata)
        ours = {key: tensor for key, tensor in tensors.items() if not key.startswith(_TEXT_ENCODERS)}
        pairs, unknown = _pairs(ours, self._places, self._shapes)
        for pair in pairs.values():
            if "scale" not in pair.found and not {"down", "up"} <= pair.found.keys():
                unknown.append(next(iter(pair.keys.values())))  # half of a pair
        if unknown or not pairs:
            shown = ", ".join(sorted(unknown)[:SHOWN])
            more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            found = f"no part of this FLUX.1, or no plain LoRA: {shown}{more}" if unknown else "nothing for a FLUX.1"
            raise UserError(
                f"{path}: {found}. Expected a LoRA of this teacher, not DoRA, LoHa or LoKr. Nothing was fused."
            )
        taken: dict[str, list[range]] = {}
        for name, pair in pairs.items():
            if name in self._places:
                place = self._places[name]
                rows, others = range(place.first, place.first + place.rows), taken.setdefault(place.module, [])
                if any(rows.start < other.stop and other.start < rows.stop for other in others):
                    raise UserError(f"{path}: has {place.module} twice, in two spellings; delete one of them.")
                others.append(rows)
            self._add(path, name, pair, strength, scaling)
        note = f"{path.name} changes {len(pairs)} layers at strength {strength:g}"
        left = len(tensors) - len(ours)
        return note + (f"; {left} tensors are a text encoder's and left out." if left else ".")

    def _add(self, path: Path, name: str, pair: _Pair, strength: float, scaling: _Scaling) -> None:
        if "scale" in pair.found:
            self._check(path, pair.keys["scale"], pair.found["scale"].shape, self._shapes[name], name)
            self._norms.setdefault(name, []).append((strength, pair.found["scale"]))
            return
        place, down_RI, up_OR = self._places[name], pair.found["down"], pair.found["up"]
        weight, rank = f"{place.module}.weight", down_RI.shape[0]
        inputs = self._shapes[weight][1]
        self._check(path, pair.keys["down"], down_RI.shape, (rank, inputs), weight)
        self._check(path, pair.keys["up"], up_OR.shape, (place.rows, rank), weight)
        alpha = pair.found.get("alpha")
        scale = strength * (scaling.of(name, rank) if alpha is None else alpha.item() / rank)
        self._low_rank.setdefault(weight, []).append((place, scale, _placed(up_OR, place), down_RI))
        if "bias" in pair.found:
            bias = pair.found["bias"]
            self._check(path, pair.keys["bias"], bias.shape, (place.rows,), f"{place.module}.bias")
            self._vectors.setdefault(f"{place.module}.bias", []).append((place, scale, _placed(bias, place)))

    def _check(self, path: Path, key: str, found: torch.Size, expected: tuple[int, ...], name: str) -> None:
        if tuple(found) != expected:
            raise UserError(
                f"{path}: {key} is {list(found)}; expected {list(expected)} for {name} {list(self._shapes[name])} of this "
                "teacher. It is the LoRA of another model. Nothing was fused."
            )


class _Scaling:
    """alpha / R of a file without alphas: of PEFT's configuration if diffusers has written it down, else 1."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        stored: dict[str, Any] = json.loads(metadata.get(_METADATA, "{}"))
        self._about = {key.removeprefix("transformer."): value for key, value in stored.items()}

    def of(self, module: str, rank: int) -> float:
        alpha = self._about.get("lora_alpha", rank)
        for pattern, own in (self._about.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = own
        return alpha / (math.sqrt(rank) if self._about.get("use_rslora") else rank)


def _placed(up: Tensor, place: _Place) -> Tensor:
    return swap_halves(up) if place.swap else up


def _places(dims: FluxDims) -> dict[str, _Place]:
    """For every spelling of a linear layer of a FLUX.1, with dots, where it lies."""
    hidden, places = dims.hidden_size, {}
    for name, source in diffusers_sources(dims).items():
        if not name.endswith(".weight"):
            continue
        module, first = name.removesuffix(".weight"), 0
        places[module] = _Place(module=module, first=0, rows=sum(source.rows))
        for part, rows in zip(source.names, source.rows, strict=True):
            places[part.removesuffix(".weight")] = _Place(module=module, first=first, rows=rows, swap=source.swap)
            first += rows
    for i in range(dims.double_blocks):  # XLabs' names
        block = f"double_blocks.{i}"
        for number, stream in ((1, "img"), (2, "txt")):
            places[f"{block}.processor.qkv_lora{number}"] = places[f"{block}.{stream}_attn.qkv"]
            places[f"{block}.processor.proj_lora{number}"] = places[f"{block}.{stream}_attn.proj"]
    for i in range(dims.single_blocks):
        block = f"single_blocks.{i}"
        places[f"{block}.processor.qkv_lora"] = _Place(module=f"{block}.linear1", first=0, rows=3 * hidden)
        places[f"{block}.processor.proj_lora"] = places[f"{block}.linear2"]
    return places


def _pairs(
    tensors: Mapping[str, Tensor], places: Mapping[str, _Place], norms: Mapping[str, object]
) -> tuple[dict[str, _Pair], list[str]]:
    """By module (or norm), what the file has of it; and the keys that are nothing of this FLUX.1, or are there twice."""
    spellings = {module.replace(".", "_"): module for module in places} | {module: module for module in places}
    pairs: dict[str, _Pair] = {}
    unknown = []
    for key, tensor in tensors.items():
        for module, role in _readings(key):
            name = module if role == "scale" and module in norms else spellings.get(module)
            if name is not None and role not in (pair := pairs.setdefault(name, _Pair())).found:
                pair.found[role], pair.keys[role] = tensor, key
                break
        else:
            unknown.append(key)
    return pairs, unknown


def _readings(key: str) -> Iterator[tuple[str, str]]:
    """(module, role) as which a key may be read."""
    bare = key
    for prefix in (*_PREFIXES, "lora_unet_"):
        bare = bare.removeprefix(prefix)
    for role, suffixes in _ROLES.items():
        for suffix in suffixes:
            if bare.endswith(suffix):
                yield (bare if role == "scale" else bare.removesuffix(suffix)), role

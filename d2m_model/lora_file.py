"""LoRA files of FLUX.1 in all their key names, read as changes of a dense FLUX.1's tensors by BFL name, at any depth.

Known names: diffusers' and PEFT's (lora_A, lora_B), kohya's (lora_unet_..., with BFL's or diffusers' module names),
ComfyUI's (diffusion_model. before BFL's names), XLabs' processors, and BFL's own control LoRAs with biases and norms.
diffusers has converters for most of them, but they know one depth and one width, and silently drop unknown keys.

Shapes: O outputs and I inputs of a linear layer, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from .config import FluxDims
from .foreign import MessageError
from .keys import dense_shapes, diffusers_sources, swap_halves
from .tensor_file import is_finite

_PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."),
    *("lora_transformer_", "lora_unet_", "lycoris_"),
)
_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.")
_ROLES = {
    "down": (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".down.weight", ".lora_A"),
    "up": (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".up.weight", ".lora_B"),
    "alpha": (".alpha",),
    "bias": (".lora_B.bias",),
    "diff": (".diff",),
    "diff_b": (".diff_b",),
    "norm": (".query_norm.scale", ".key_norm.scale"),
}
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$")  # PEFT's, such as lora_A.default.weight
_MAX_PATTERN = 200  # characters of a key of alpha_pattern
_OTHER_KINDS = re.compile(r"lora_magnitude_vector|dora_scale|\.lokr_|\.hada_|\.oft_")


class LoraError(MessageError):
    """The tensors are not a plain LoRA of this FLUX.1; the message names the key."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LoraChange:
    """Added to a tensor of a dense FLUX.1, by BFL name, from row `first` on: scale times up [O, R] times down [R, I].

    For a bias `down` is None and `up` is [O]; for a change that is stored whole `down` is None and `up` is [O, I].
    """

    name: str
    first: int
    scale: float
    up: Tensor
    down: Tensor | None


@dataclass(kw_only=True, slots=True, frozen=True)
class LoraContents:
    """Contents of one LoRA.

    changes        changes of weights and biases
    norms          new values of norms' scales, by BFL name (BFL's control LoRAs)
    layers         number of layers and norms that change
    unknown        keys that are not part of this FLUX.1
    text_encoders  number of tensors that belong to a text encoder
    """

    changes: tuple[LoraChange, ...]
    norms: Mapping[str, Tensor]
    layers: int
    unknown: tuple[str, ...]
    text_encoders: int


def read_lora(
    tensors: Mapping[str, Tensor], dims: FluxDims, peft_config: Mapping[str, Any] | None = None
) -> LoraContents:
    """Read a LoRA for a dense FLUX.1 of `dims`. `peft_config` gives alpha where the tensors have none; else it is R.

    Raises LoraError for other adapters (DoRA, LoKr, ...), half a pair, a layer that is there twice, and other shapes.
    """
    if other := next((key for key in tensors if _OTHER_KINDS.search(key)), None):
        raise LoraError(f"{other}: a DoRA, LoKr, LoHa or OFT; expected a plain LoRA.")
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(_TEXT_ENCODERS)}
    shapes, layers = dense_shapes(dims), _layers(dims)
    pairs, unknown = _pairs(own, layers, shapes)
    changes: list[LoraChange] = []
    norms: dict[str, Tensor] = {}
    rows_read: dict[str, list[range]] = {}
    for name, pair in pairs.items():
        if "norm" in pair.tensors:
            norms[name] = _checked(pair, "norm", shapes[name], name, shapes)
            continue
        layer = layers[name]
        rows = range(layer.first, layer.first + layer.rows)
        others = rows_read.setdefault(layer.module, [])
        if any(rows.start < other.stop and other.start < rows.stop for other in others):
            raise LoraError(f"The LoRA has {layer.module} twice, in two spellings; delete one of them.")
        others.append(rows)
        changes += _changes(name, pair, layer, shapes, peft_config or {})
    return LoraContents(
        changes=tuple(changes),
        norms=norms,
        layers=len(pairs),
        unknown=tuple(unknown),
        text_encoders=len(tensors) - len(own),
    )


def peft_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Scale of a module's LoRA by PEFT's LoraConfig: alpha / R, or alpha / sqrt(R) with rsLoRA.

    As in PEFT (get_pattern_key), the first key of `alpha_pattern` that matches the end of the module's name counts.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise LoraError(f"alpha_pattern is {patterns!r}; expected an object of alphas by module.")
    matching = (alpha for pattern, alpha in patterns.items() if _alpha_pattern(pattern).match(module))
    alpha = next(matching, config.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise LoraError(f"alpha of {module} is {alpha!r}; expected a number.")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


@cache
def _alpha_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a key of alpha_pattern.

    Raises LoraError for one that is none, or that could take minutes: a repeated group, or many repetitions.
    """
    try:
        if len(pattern) > _MAX_PATTERN or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)\??[*+{]", pattern):
            raise LoraError(
                f"alpha_pattern has {pattern[:_MAX_PATTERN]!r}; expected a module's name or a simple pattern."
            )
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise LoraError(f"alpha_pattern has {pattern!r}, which is no pattern ({error}).") from None


@dataclass(kw_only=True, slots=True, frozen=True)
class _Layer:
    """Rows of a linear layer's tensors by BFL name; `swap` exchanges the halves first."""

    module: str
    first: int
    rows: int
    swap: bool = False


@dataclass(kw_only=True, slots=True)
class _Pair:
    """Tensors of one layer or norm and their keys in the file, by role."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def _changes(
    name: str, pair: _Pair, layer: _Layer, shapes: Mapping[str, tuple[int, ...]], peft_config: Mapping[str, Any]
) -> Iterator[LoraChange]:
    """Changes of one layer's weight and bias."""
    weight = f"{layer.module}.weight"
    for role, name_of_tensor, shape in (
        ("diff", weight, (layer.rows, *shapes[weight][1:])),
        ("diff_b", f"{layer.module}.bias", (layer.rows,)),
    ):
        if role in pair.tensors:
            whole = _checked(pair, role, shape, name_of_tensor, shapes)
            whole = swap_halves(whole) if layer.swap else whole
            yield LoraChange(name=name_of_tensor, first=layer.first, scale=1.0, up=whole, down=None)
    if not {"up", "down", "bias", "alpha"} & pair.tensors.keys():
        return
    for role, other in (("down", "up"), ("up", "down")):
        if role not in pair.tensors:
            key = pair.keys.get(other) or next(iter(pair.keys.values()))
            raise LoraError(f"{key} is half of a pair: its {role} projection is missing.")
    rank = pair.tensors["down"].shape[0] if pair.tensors["down"].ndim else 0
    if rank == 0:
        raise LoraError(f"{pair.keys['down']} is {list(pair.tensors['down'].shape)}, of rank 0; the file is damaged.")
    down = _checked(pair, "down", (rank, shapes[weight][1]), weight, shapes)
    up = _checked(pair, "up", (layer.rows, rank), weight, shapes)
    alpha = pair.tensors.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"{pair.keys['alpha']} is {list(alpha.shape)}; expected one number.")
    scale = peft_scale(peft_config, name, rank) if alpha is None else alpha.item() / rank
    if not math.isfinite(scale):
        raise LoraError(f"The scale of {name} is {scale}; the file is damaged.")
    up = swap_halves(up) if layer.swap else up
    yield LoraChange(name=weight, first=layer.first, scale=scale, up=up, down=down)
    if "bias" in pair.tensors:
        bias = _checked(pair, "bias", (layer.rows,), f"{layer.module}.bias", shapes)
        bias = swap_halves(bias) if layer.swap else bias
        yield LoraChange(name=f"{layer.module}.bias", first=layer.first, scale=scale, up=bias, down=None)


def _checked(
    pair: _Pair, role: str, expected: tuple[int, ...], name: str, shapes: Mapping[str, tuple[int, ...]]
) -> Tensor:
    tensor = pair.tensors[role]
    if tuple(tensor.shape) != expected:
        raise LoraError(
            f"{pair.keys[role]} is {list(tensor.shape)}; expected {list(expected)} for {name} {list(shapes[name])} of this "
            "FLUX.1. The LoRA was made for another model."
        )
    if not is_finite(tensor):
        raise LoraError(f"{pair.keys[role]} has NaN or infinite values; the file is damaged.")
    return tensor


def _layers(dims: FluxDims) -> dict[str, _Layer]:
    """Every linear layer of a FLUX.1, by each of its names (with dots)."""
    hidden, layers = dims.hidden_size, {}
    for name, source in diffusers_sources(dims).items():
        if not name.endswith(".weight"):
            continue
        module, first = name.removesuffix(".weight"), 0
        layers[module] = _Layer(module=module, first=0, rows=sum(source.rows))
        for part, rows in zip(source.names, source.rows, strict=True):
            layers[part.removesuffix(".weight")] = _Layer(module=module, first=first, rows=rows, swap=source.swap)
            first += rows
    for block in dims.blocks:  # XLabs' names
        name = block.name
        if block.kind == "double":
            for number, stream in ((1, "img"), (2, "txt")):
                layers[f"{name}.processor.qkv_lora{number}"] = layers[f"{name}.{stream}_attn.qkv"]
                layers[f"{name}.processor.proj_lora{number}"] = layers[f"{name}.{stream}_attn.proj"]
        else:
            qkv = _Layer(module=f"{name}.linear1", first=0, rows=3 * hidden)
            layers[f"{name}.processor.qkv_lora"] = layers[f"{name}.linear1_qkv"] = qkv
            layers[f"{name}.processor.proj_lora"] = layers[f"{name}.linear2"]
    return layers


def _pairs(
    tensors: Mapping[str, Tensor], layers: Mapping[str, _Layer], norms: Mapping[str, object]
) -> tuple[dict[str, _Pair], list[str]]:
    """Tensors grouped by layer or norm, and the keys that are not part of this FLUX.1 or are there twice."""
    spellings = {module.replace(".", "_"): module for module in layers} | {module: module for module in layers}
    pairs: dict[str, _Pair] = {}
    unknown = []
    for key, tensor in tensors.items():
        for module, role in _readings(key):
            name = module if role == "norm" and module in norms else spellings.get(module)
            if name is not None and role not in (pair := pairs.setdefault(name, _Pair())).tensors:
                pair.tensors[role], pair.keys[role] = tensor, key
                break
        else:
            unknown.append(key)
    return pairs, unknown


def _readings(key: str) -> Iterator[tuple[str, str]]:
    """(module, role) pairs that a key may stand for."""
    bare = _ADAPTER_NAME.sub(r"\1\2", key)
    while prefix := next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), None):  # some are there twice
        bare = bare.removeprefix(prefix)
    for role, suffixes in _ROLES.items():
        for suffix in suffixes:
            if bare.endswith(suffix):
                yield (bare if role == "norm" else bare.removesuffix(suffix)), role

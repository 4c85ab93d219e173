"""Quantised weights: how a file marks them, and the tensors they need. ComfyUI reads them; this module only checks.

Files mark them in three ways: with a tensor `comfy_quant` per layer, with a list in the header's metadata, or (older)
with `scaled_fp8` and a `scale_weight` per layer. A weight that is merely stored in float8 is not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .foreign import read_json
from .keys import CHECKPOINT_PREFIX
from .tensor_file import CheckpointError

HEADER_KEY = "_quantization_metadata"  # in the header's metadata

# Names of the tensors that quantising tools add to a layer.
COMPANIONS = (
    *("comfy_quant", "weight_scale", "weight_scale_2", "input_scale"),
    *("scale_weight", "scale_input", "pre_quant_scale"),
)
_MAX_DESCRIPTION = 10_000  # bytes of a comfy_quant


def quantised_layers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the quantised layers that the header lists, by BFL name, with their formats. Empty if it lists none.

    Raises CheckpointError for a list of another form.
    """
    try:
        stored = read_json(metadata.get(HEADER_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{HEADER_KEY} in the header is not JSON ({error}); the file is damaged.") from None
    layers = stored.get("layers", {}) if isinstance(stored, dict) else None
    if not isinstance(layers, dict) or not all(map(_is_description, layers.values())):
        raise CheckpointError(f"{HEADER_KEY} in the header has no object of layers with formats; the file is damaged.")
    return {name.removeprefix(CHECKPOINT_PREFIX): layer for name, layer in layers.items()}


def description_of(name: str, tensor: Tensor) -> dict[str, Any]:
    """Parse a layer's `comfy_quant`, the tensor `name`. Raises CheckpointError for one that ComfyUI cannot read."""
    if tensor.dtype == torch.uint8 and tensor.numel() <= _MAX_DESCRIPTION:
        with suppress(ValueError):
            about = read_json(tensor.cpu().numpy().tobytes())
            if _is_description(about):
                return dict(about)
    raise CheckpointError(f"{name}, the description of a quantised layer, cannot be read; the file is damaged.")


def _is_description(about: Any) -> bool:
    return isinstance(about, dict) and isinstance(about.get("format"), str)


def is_companion(name: str, expected: Mapping[str, object]) -> bool:
    """Test whether a quantising tool added the tensor `name` to a layer whose weight is in `expected`."""
    module, _, kind = name.rpartition(".")
    return kind in COMPANIONS and f"{module}.weight" in expected


def quantisation_problems(names: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    """Return a description of every problem with the quantised layers among a file's tensors."""
    problems = []
    for name in names:
        module, _, kind = name.rpartition(".")
        if not is_companion(name, expected):
            continue
        if module.startswith("block_groups.") or module.endswith(".router") or ".capacity." in module:
            part = "stand-ins" if ".stand_ins." in module else "routers"
            problems.append(f"{name} says that {module} is quantised; {part} must stay in a floating-point type")
        elif kind == "comfy_quant" and f"{module}.weight_scale" not in names:
            problems.append(f"{module}.weight_scale is missing ({module} is quantised)")
    return problems

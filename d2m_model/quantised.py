"""Quantised weights: how a file tells of them, and what must stand beside them. ComfyUI reads them; here they are checked.

Three ways are in use: a tensor `comfy_quant` beside the weight, a list in the header's metadata, and the older
`scaled_fp8` with a `scale_weight` beside each weight. A weight that is merely stored in float8 is not quantised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .keys import CHECKPOINT_PREFIX

HEADER_KEY = "_quantization_metadata"  # of the header's metadata

# What quantising tools put beside a weight.
COMPANIONS = (
    *("comfy_quant", "weight_scale", "weight_scale_2", "input_scale"),
    *("scale_weight", "scale_input", "pre_quant_scale"),
)


def quantised_layers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The quantised layers that the header lists, by BFL name, and their formats. Empty if it lists none."""
    try:
        layers = json.loads(metadata.get(HEADER_KEY, "{}")).get("layers", {})
        return {name.removeprefix(CHECKPOINT_PREFIX): layer for name, layer in layers.items()}
    except (ValueError, AttributeError):
        return {}


def is_companion(name: str, expected: Mapping[str, object]) -> bool:
    """Whether `name` is what a quantising tool puts beside a weight of `expected`."""
    module, _, kind = name.rpartition(".")
    return kind in COMPANIONS and f"{module}.weight" in expected


def quantisation_problems(names: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    """What is wrong with the quantised layers among a file's tensors."""
    found = []
    for name in names:
        module, _, kind = name.rpartition(".")
        if not is_companion(name, expected):
            continue
        if module.endswith(("router", "router_x", "router_y")) or ".capacity." in module:
            found.append(f"{name} says that {module} is quantised; routers must stay in a floating-point type")
        elif kind == "comfy_quant" and f"{module}.weight_scale" not in names:
            found.append(f"{module}.weight_scale is missing ({module} is quantised)")
    return found

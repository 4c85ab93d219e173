"""Refusal of changes to a MODEL's layers that are not in its weights, and so would not be in a file."""

from __future__ import annotations

from typing import Any

_BYPASS = "bypass_lora"  # ComfyUI's name for the injection of Load LoRA (Bypass)
_MOST_NAMES = 3  # in a message


def refuse_injections(model: Any, node: str) -> None:
    """Raise ValueError if something changes the layers while they run, instead of their weights."""
    if model.injections.get(_BYPASS):
        raise ValueError(
            f"{node}: this MODEL has a LoRA that does not change its weights (Load LoRA (Bypass)), so it would be "
            "lost. Use Load LoRA, which adds it to the weights."
        )
    kinds = {"injections": model.injections, "weight wrappers": model.weight_wrapper_patches}
    for kind, found in kinds.items():
        if names := sorted(str(name) for name, entries in found.items() if entries):
            raise ValueError(
                f"{node}: a node before this one changes the layers of this MODEL while they run ({kind}: "
                f"{', '.join(names[:_MOST_NAMES])}), which is not part of the weights and would be lost. Put that node after "
                "this one, or leave it out."
            )

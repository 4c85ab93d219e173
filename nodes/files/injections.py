"""What changes a MODEL's layers while they run, and is in no weight: no file holds it."""

from __future__ import annotations

from typing import Any

_BYPASS = "bypass_lora"  # ComfyUI's name for what Load LoRA (Bypass) injects
_MOST_NAMES = 3  # in a message


def refuse_injections(model: Any, node: str) -> None:
    """Raises ValueError for what changes the layers while they run, in no weight: nothing of it would be in a file."""
    if model.injections.get(_BYPASS):
        raise ValueError(
            f"{node}: there is a LoRA on this MODEL that leaves the weights as they are (Load LoRA (Bypass)), so that it "
            "would be lost. Load it by Load LoRA, which makes it part of the weights."
        )
    kinds = {"injections": model.injections, "weight wrappers": model.weight_wrapper_patches}
    for kind, found in kinds.items():
        if names := sorted(str(name) for name, entries in found.items() if entries):
            raise ValueError(
                f"{node}: a node before this one changes the layers of this MODEL while they run ({kind}: "
                f"{', '.join(names[:_MOST_NAMES])}), which is in no weight and would be lost. Put that node after this one, "
                "or leave it out."
            )

"""Check by its shapes whether a LoRA fits the model, before anything is patched.

ComfyUI notices only when it patches a weight, tensor by tensor, and reshapes a change with the right number of elements.
"""

from __future__ import annotations

from typing import Any

from comfy.weight_adapter import BOFTAdapter, GLoRAAdapter, LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter

WeightShape = tuple[int | None, ...]  # None: any size


def shape_of_change(patch: Any) -> WeightShape | None:
    """Return the shape of the weight that a patch from comfy.lora.load_lora fits, or None if it does not tell."""
    if isinstance(patch, tuple):
        kind, (tensor, *_) = patch
        return tuple(tensor.shape) if kind in ("diff", "set") else None
    if not isinstance(patch, (LoRAAdapter, LoHaAdapter, LoKrAdapter, GLoRAAdapter, OFTAdapter, BOFTAdapter)):
        return None
    weights = patch.weights
    if isinstance(patch, LoRAAdapter):
        up, down, _, mid, _, reshape = weights
        if reshape is not None:
            return None  # the patch reshapes the weight
        return up.shape[0], down.shape[1:].numel() * (1 if mid is None else mid.shape[2:].numel())
    if isinstance(patch, LoHaAdapter):
        up, down, _, _, _, core, *_ = weights
        return _product(up, down, core)
    if isinstance(patch, LoKrAdapter):
        outer, inner, _, outer_up, outer_down, inner_up, inner_down, core, _ = weights
        rows, columns = _product(outer_up, outer_down, None) if outer is None else outer.shape
        inner_rows, inner_columns = _product(inner_up, inner_down, core) if inner is None else _matrix(inner)
        return rows * inner_rows, columns * inner_columns
    if isinstance(patch, GLoRAAdapter):
        _, _, b1, b2, *_ = weights
        # b1 is up and b2 down, or (older files) the other way round. For a square weight both products exist.
        products = [_product(up, down, None) for up, down in ((b1, b2), (b2, b1)) if up.shape[1] == down.shape[0]]
        return max(products, default=None)
    blocks = weights[0]  # blocks of rotated rows [blocks, size, size]; BOFT has a first axis for its stages
    return blocks.shape[-3] * blocks.shape[-1], None


def fits(change: WeightShape, weight: WeightShape) -> bool:
    return len(change) == len(weight) and all(size in (None, want) for size, want in zip(change, weight, strict=True))


def format_shape(shape: WeightShape) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _matrix(tensor: Any) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[1:].numel()


def _product(up: Any, down: Any, core: Any) -> tuple[int, int]:
    """Return the shape of up @ down. With a Tucker core, the factors are [R, rows] and [R, columns]."""
    if core is None:
        return up.shape[0], down.shape[1:].numel()
    return up.shape[1], down.shape[1] * core.shape[2:].numel()

"""Expert Maps of traced runs: the node by itself, on a store of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.test_trace import Traced

WIDGETS: dict[str, Any] = {
    "step": -1,
    "block": -1,
    "prompt": "positive",
    "opacity": 0.75,
    "numbers": False,
    "legend": False,
}
GREY = 0.5


def image_of(latents: Tensor, value: float = GREY) -> Tensor:
    batch, _, height, width = latents.shape
    return torch.full((batch, 8 * height, 8 * width, 3), value)


def drawn(host: Comfy, node: str = "7", **inputs: Any) -> Any:
    """Return the node's result; its map is [B, H, W, C]."""
    return host.execute("D2MExpertMap", hidden={hidden().unique_id: node}, **{**WIDGETS, **inputs})


def hidden() -> Any:
    from comfy_api.latest import io

    return io.Hidden


def by_patch(map_HW3: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The colour of the middle of every patch, [h, w, 3]."""
    rows, columns = ((np.arange(n) + 0.5) * side / n for n, side in zip(grid, map_HW3.shape[:2], strict=True))
    return map_HW3.numpy()[rows.astype(int)][:, columns.astype(int)]


def run(host: Comfy, model: Any, store: Any, node: str = "5") -> tuple[Traced, Tensor]:
    """A traced MODEL, sampled."""
    clone, handle = host.execute("D2MTraceRouting", hidden={hidden().unique_id: node}, model=model).result
    it = Traced(clone, handle, store)
    return it, host.sample(it.model, (1, 8, 12), steps=2)

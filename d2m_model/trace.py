"""What was routed where in one sampling run, recorded compactly."""

from __future__ import annotations

from .mob import BlockRouting
from .routers import Routing, UnevenRouting


class Recorder:
    """Hears what the routers of one run choose."""

    def experts(self, ffn: str, routing: Routing | UnevenRouting, batch: int) -> None:
        """The choice of `ffn`'s router for the tokens of `batch` samples, sample by sample."""
        raise NotImplementedError

    def blocks(self, group: int, routing: BlockRouting) -> None:
        """The choice of block group `group`, for every sample."""
        raise NotImplementedError

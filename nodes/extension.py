"""The list of the pack's nodes, and what is set up when ComfyUI loads it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import flux_moe, lora
from .controls import TopK
from .demo import EmojiPrompt
from .loading import LoadFluxMoE
from .saving import SaveFluxMoE


class Dense2MoE(ComfyExtension):
    async def on_load(self) -> None:
        flux_moe.register()
        lora.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadFluxMoE, SaveFluxMoE, TopK, EmojiPrompt]

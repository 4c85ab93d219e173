"""The list of the pack's nodes, and what is set up when ComfyUI loads it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import cost, live, trace_routes
from .controls import ActiveBlocks, TopK
from .conversion import ConvertFlux
from .demo import EmojiPrompt
from .expert_map import ExpertMap
from .expert_mask import ExpertMask
from .loading import LoadFluxMoE
from .lora import load_lora
from .model import flux_moe
from .replay import Replay
from .saving import SaveFluxMoE
from .schedule import Schedule
from .tracing import TraceRouting


class Dense2MoE(ComfyExtension):
    async def on_load(self) -> None:
        flux_moe.register()
        load_lora.register()
        live.register()
        cost.register()
        trace_routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadFluxMoE,
            SaveFluxMoE,
            ConvertFlux,
            TopK,
            ActiveBlocks,
            Schedule,
            ExpertMask,
            Replay,
            TraceRouting,
            ExpertMap,
            EmojiPrompt,
        ]

"""The list of the pack's nodes, and what is set up when ComfyUI loads it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import cost, demo
from .controls import live_values
from .controls.active_blocks import ActiveBlocks
from .controls.budget import Budget
from .controls.expert_mask import ExpertMask
from .controls.replay import Replay
from .controls.schedule import Schedule
from .controls.top_k import TopK
from .demo import EmojiPrompt
from .expert_map import routes
from .expert_map.map_node import ExpertMap
from .expert_map.trace_node import TraceRouting
from .files.convert_node import ConvertFlux
from .files.load_node import LoadFluxMoE
from .files.save_node import SaveFluxMoE
from .lora import load_lora, merging
from .model import flux_moe


class Dense2MoE(ComfyExtension):
    async def on_load(self) -> None:
        flux_moe.register()
        load_lora.register()
        merging.register()
        live_values.register()
        cost.register()
        routes.register()
        demo.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadFluxMoE,
            SaveFluxMoE,
            ConvertFlux,
            TopK,
            Budget,
            ActiveBlocks,
            Schedule,
            ExpertMask,
            Replay,
            TraceRouting,
            ExpertMap,
            EmojiPrompt,
        ]

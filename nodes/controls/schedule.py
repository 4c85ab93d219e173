"""The Schedule node: a different value of a setting for each part of the model's schedule, from noise to image."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .control_node import ControlNode
from .effects import ACTIVE_BLOCKS, CAPACITY, PERCENT, SIGMA, TOP_K

_DEFAULT_PIECES = "0 % - 40 %: 1\n40 % - 100 %: 4"


class Schedule(ControlNode):
    node_id, title = "D2MSchedule", "FLUX-MoE Schedule"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.control_schema(
            description=(
                "Changes Top-K, active blocks or capacity during sampling: one value for each part of the way from noise to "
                "image. Outside of all pieces the value set before this node applies. You can edit the text during sampling."
            ),
            search_aliases=[
                "schedule top k",
                "timestep range",
                "start percent",
                "sigma",
                "dense2moe",
                "flux moe speed",
            ],
            widgets=[
                io.Combo.Input(
                    "setting",
                    options=[TOP_K, ACTIVE_BLOCKS, CAPACITY],
                    default=TOP_K,
                    tooltip=(
                        "The setting that changes: experts per token, blocks per block group, or (for files with capacity "
                        "routers) the compute of the experts."
                    ),
                ),
                io.Combo.Input(
                    "unit",
                    options=[PERCENT, SIGMA],
                    default=PERCENT,
                    tooltip=(
                        "The unit of start and end. percent: percent of the model's whole schedule, like start_percent and "
                        "end_percent in ComfyUI's nodes: 0 is pure noise, 100 the image. Image to image (denoise below 1) "
                        "begins late in the schedule. sigma: the noise level itself, which falls from 1 to 0."
                    ),
                ),
                io.String.Input(
                    "pieces",
                    multiline=True,
                    default=_DEFAULT_PIECES,
                    tooltip=(
                        "One piece START - END: VALUE per line, such as 0 % - 40 %: 1. A piece includes its start but not its "
                        "end, so the next one can begin there. Where pieces overlap, the later line applies. # begins a "
                        "comment. Active blocks may be a list with a number for each group: 0 % - 50 %: 1,0,2."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, setting: str, unit: str, pieces: str) -> io.NodeOutput:
        return cls.add_to(model, setting=setting, unit=unit, pieces=pieces)

"""The Schedule node: another value of a setting for each part of the model's schedule, from noise to image."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .control_node import ControlNode
from .effects import ACTIVE_BLOCKS, CAPACITY, PERCENT, SIGMA, TOP_K

PIECES = "0 - 40: 1\n40 - 100: 4"


class Schedule(ControlNode):
    node_id, title = "D2MSchedule", "FLUX-MoE Schedule"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.control_schema(
            description=(
                "Changes Top-K, active blocks or capacity in the course of sampling: a value for each part of the way from "
                "noise to image. "
                "Where no piece holds, what was set before it does. Can be rewritten while it samples."
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
                        "What changes: experts per token, blocks per block group, or (files with capacity routers) the "
                        "experts' share of compute."
                    ),
                ),
                io.Combo.Input(
                    "unit",
                    options=[PERCENT, SIGMA],
                    default=PERCENT,
                    tooltip=(
                        "How pieces count. percent: of the model's whole schedule, as start_percent and end_percent of "
                        "ComfyUI's nodes do: 0 is pure noise, 100 the image. Image to image (denoise below 1) begins late in "
                        "it. sigma: the noise level itself, which falls from 1 to 0."
                    ),
                ),
                io.String.Input(
                    "pieces",
                    multiline=True,
                    default=PIECES,
                    tooltip=(
                        "One START - END: VALUE to a line, such as 0 - 40: 1. A piece holds from its start up to its end, "
                        "so that the next can begin there. Where pieces overlap the later line holds. # begins a comment. "
                        "Active blocks may be a list, one for each group: 0 - 50: 1,0,2."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, setting: str, unit: str, pieces: str) -> io.NodeOutput:
        return cls.add_to(model, setting=setting, unit=unit, pieces=pieces)

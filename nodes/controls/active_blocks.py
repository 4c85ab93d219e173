"""The Active blocks node: how many blocks of each block group run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .control_node import ControlNode
from .kinds import MAX_BLOCKS


class ActiveBlocks(ControlNode):
    node_id, title = "D2MActiveBlocks", "FLUX-MoE Active blocks"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.control_schema(
            description=(
                "Sets how many blocks of every block group run (Mixture of Blocks: presets M, S and XS). Each sample's "
                "router chooses which; the others are skipped. Move the slider while it samples: the next step follows."
            ),
            search_aliases=["mixture of blocks", "skip blocks", "block groups", "depth", "dense2moe", "flux moe speed"],
            widgets=[
                io.Int.Input(
                    "active_blocks",
                    default=1,
                    min=0,
                    max=MAX_BLOCKS,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Blocks that run in each group, 0 (none) up to as many as the largest group has. A smaller group "
                        "runs all of its own."
                    ),
                ),
                io.String.Input(
                    "per_group",
                    default="",
                    tooltip=(
                        "In place of active_blocks one number for each group, in the file's order, such as 1,0,2. Empty: "
                        "active_blocks holds for all."
                    ),
                    advanced=True,
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, active_blocks: int, per_group: str = "") -> io.NodeOutput:
        return cls.add_to(model, active_blocks=active_blocks, per_group=per_group)

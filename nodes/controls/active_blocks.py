"""The Active Blocks node: how many blocks of each block group run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .control_node import ControlNode
from .kinds import MAX_BLOCKS


class ActiveBlocks(ControlNode):
    node_id, title = "D2MActiveBlocks", "FLUX-MoE Active Blocks"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.control_schema(
            description=(
                "Sets how many blocks of every block group run (Mixture of Blocks: presets M, S and XS). A router chooses "
                "them for each sample; the others are skipped. You can move the slider during sampling: the next step uses "
                "the new value."
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
                        "Blocks that run in each group, from 0 (none) to as many as the largest group has. A group with "
                        "fewer blocks runs all of them."
                    ),
                ),
                io.String.Input(
                    "per_group",
                    default="",
                    tooltip=(
                        "Replaces active_blocks by one number for each group, in the file's order, such as 1,0,2. If empty, "
                        "active_blocks applies to all groups."
                    ),
                    advanced=True,
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, active_blocks: int, per_group: str = "") -> io.NodeOutput:
        return cls.add_to(model, active_blocks=active_blocks, per_group=per_group)

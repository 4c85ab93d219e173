"""The Expert Mask node: mutes or boosts experts, block by block."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .control_node import ControlNode


class ExpertMask(ControlNode):
    node_id, title = "D2MExpertMask", "FLUX-MoE Expert Mask"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.control_schema(
            description=(
                "Mutes or boosts single experts in blocks of your choice, to find out what each of them paints. Tokens are "
                "routed as before, but the output of each chosen expert is multiplied by its weight. You can edit the text "
                "during sampling."
            ),
            search_aliases=[
                "mute expert",
                "boost expert",
                "ablate",
                "disable experts",
                "dense2moe",
                "mixture of experts",
            ],
            widgets=[
                io.String.Input(
                    "mask",
                    multiline=True,
                    default="",
                    tooltip=(
                        "One rule BLOCKS: EXPERT=WEIGHT[, EXPERT=WEIGHT…] per line. BLOCKS is double_blocks.3.img_mlp, "
                        "double_blocks.3.txt_mlp or single_blocks.3, or a pattern such as single_blocks.*; EXPERT is a "
                        "number from 0, or *; WEIGHT is 0 (mute), 1 (no change) or another number, such as 2. Later lines win. "
                        "# begins a comment."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, mask: str) -> io.NodeOutput:
        return cls.add_to(model, mask=mask)

"""The Top-K node: experts per token, or the capacity factor of a file with capacity routers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .control_node import ControlNode
from .effects import AS_IN_FILE
from .kinds import GATES, MAX_CAPACITY, MAX_EXPERTS


class TopK(ControlNode):
    node_id, title = "D2MTopK", "FLUX-MoE Top-K"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.control_schema(
            description=(
                "Sets how many experts process each token, or how much compute a file with capacity routers uses. "
                "More experts take more time and add detail; with all of them a converted file makes the images of its "
                "dense teacher. You can move the slider during sampling: the next step uses the new value."
            ),
            search_aliases=["experts", "top k", "capacity", "mixture of experts", "dense2moe", "flux moe speed"],
            widgets=[
                io.Int.Input(
                    "top_k",
                    default=2,
                    min=0,
                    max=MAX_EXPERTS,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Experts per token, from 0 (only the shared expert) to as many as the file has (12 in the paper). "
                        "Files with capacity routers do not use it."
                    ),
                ),
                io.Combo.Input(
                    "gate",
                    options=[AS_IN_FILE, *GATES],
                    default=AS_IN_FILE,
                    tooltip=(
                        "sum: every chosen expert counts in full, as in files converted without training. "
                        "normalised: experts count by the router's weights, as in distilled files."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "capacity",
                    default=1.0,
                    min=0.0,
                    max=MAX_CAPACITY,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Replaces top_k for files with capacity routers, which give every token as many experts as it "
                        "needs: 1 is the file's own setting, 0 no experts, 2 about twice as many. Other files do not use it."
                    ),
                    optional=True,  # for workflows that were saved before this widget existed
                    advanced=True,
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, top_k: int, gate: str, capacity: float = 1.0) -> io.NodeOutput:
        return cls.add_to(model, top_k=top_k, gate=gate, capacity=capacity)

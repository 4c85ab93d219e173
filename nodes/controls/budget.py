"""The Budget node: a share of the dense model's FLOPs, which is spent where it counts."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..model.flux_moe import require_flux_moe
from .budget_effect import WITHOUT_TABLE
from .control_node import ControlNode


class Budget(ControlNode):
    node_id, title = "D2MBudget", "FLUX-MoE Budget"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.control_schema(
            description=(
                "Sets how much compute the model takes, as a share of the dense model's, and spends it where it counts: every "
                "FFN gets its own number of experts, and every block group its own number of active blocks, at each noise "
                "level. Needs a file with a sensitivity table; other files get the one Top-K that fits. You can move the "
                "slider during sampling: the next step uses the new value."
            ),
            search_aliases=["compute budget", "flops", "speed", "sensitivity", "dense2moe", "flux moe speed"],
            widgets=[
                io.Float.Input(
                    "budget",
                    default=0.65,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Share of the dense model's FLOPs, averaged over the steps: 0.65 is 65 %. Replaces Top-K, capacity "
                        "and active blocks that were set before this node. At 1 every expert and every block runs."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, budget: float) -> io.NodeOutput:
        config = require_flux_moe(model, cls.title).moe_config
        if config.sensitivity is None:
            logging.warning(f"{cls.title}: {WITHOUT_TABLE.format(label=config.router.label)}")
        return cls.add_to(model, budget=budget)

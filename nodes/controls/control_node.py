"""The base of the control nodes: a clone of the MODEL with one more control in its transformer_options.

Clones share the weights, so two samplers of one workflow may use different settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from ..model.flux_moe import require_flux_moe
from ..model.settings import OPTIONS_KEY
from .evaluation_settings import add_control, attach_wrappers, static_settings, without_controlled
from .live_values import LIVE


class ControlNode(io.ComfyNode):
    """A node that adds a control to the MODEL that passes through it. Its widgets can be changed while sampling."""

    node_id: ClassVar[str]
    title: ClassVar[str]

    @classmethod
    def control_schema(
        cls,
        *,
        description: str,
        search_aliases: list[str],
        widgets: Sequence[io.Input],
        model_tooltip: str = "From Load FLUX-MoE, or from another FLUX-MoE control.",
        output_tooltip: str = "The same weights with this setting.",
    ) -> io.Schema:
        """Return the schema of a node with a MODEL, these widgets and the changed MODEL."""
        return io.Schema(
            node_id=cls.node_id,
            display_name=cls.title,
            category="FLUX-MoE",
            description=description,
            search_aliases=search_aliases,
            inputs=[io.Model.Input("model", tooltip=model_tooltip), *widgets],
            outputs=[io.Model.Output(display_name="MODEL", tooltip=output_tooltip)],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return LIVE.fingerprint(str(cls.hidden.unique_id))

    @classmethod
    def add_to(cls, model: Any, **values: Any) -> io.NodeOutput:
        """Return a clone of the ModelPatcher `model` with this control. `values` are those of the widgets.

        Raises ValueError if the file cannot follow it.
        """
        config = require_flux_moe(model, cls.title).moe_config
        node = cls.hidden.unique_id
        clone = model.clone()
        options = clone.model_options.get("transformer_options", {})
        others = without_controlled(options.get(OPTIONS_KEY, {}))
        name = None if node is None else str(node)
        controls = add_control(others.get("controls", ()), name, cls.node_id, values, config)
        settings = {**others, **static_settings(controls), "controls": controls}
        clone.model_options["transformer_options"] = {**options, OPTIONS_KEY: settings}
        attach_wrappers(clone)
        return io.NodeOutput(clone)

"""The base of every control node: a clone of the MODEL with one more setting in its transformer_options.

Clones share the weights, so two samplers of one graph may use different settings.
"""

from __future__ import annotations

from typing import Any, ClassVar

from comfy_api.latest import io

from ..model.flux_moe import FluxMoEModel
from ..model.settings import OPTIONS_KEY
from .evaluation_settings import at_rest, attach
from .live_values import LIVE
from .transforms import FOLDED

MODEL_TOOLTIP = "From Load FLUX-MoE, or from another FLUX-MoE control."


def with_settings(model: Any, **settings: Any) -> Any:
    """A clone of the ModelPatcher `model` with these settings over those it has."""
    return _with(model, {"node": None, "kind": "settings", "values": settings})


def with_control(model: Any, kind: str, node: str | None, values: dict[str, Any]) -> Any:
    """A clone with one more control: what node `node` of a prompt says. Raises ValueError if the file cannot follow."""
    clone = _with(model, {"node": node, "kind": kind, "values": values})
    attach(clone)
    return clone


def _with(model: Any, control: dict[str, Any]) -> Any:
    clone = model.clone()
    options = clone.model_options.get("transformer_options", {})
    before = {key: value for key, value in options.get(OPTIONS_KEY, {}).items() if key not in FOLDED}
    controls = (*before.get("controls", ()), control)
    settings = {**before, **at_rest(controls, model.model.diffusion_model.config), "controls": controls}
    clone.model_options["transformer_options"] = {**options, OPTIONS_KEY: settings}
    return clone


def flux_moe(model: Any, node: str) -> FluxMoEModel:
    """The FLUX-MoE in a ModelPatcher. Raises ValueError if there is another model in it."""
    found = model.model
    if not isinstance(found, FluxMoEModel):
        raise ValueError(
            f"{node} works on a FLUX-MoE, but this MODEL is a {type(found).__name__} without experts. "
            "Connect a MODEL from Load FLUX-MoE, or put Convert FLUX to MoE before this node."
        )
    return found


class Control(io.ComfyNode):
    """A node that sets something of the MODEL that passes through it, live while it is sampled."""

    node_id: ClassVar[str]
    title: ClassVar[str]

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return LIVE.fingerprint(str(cls.hidden.unique_id))

    @classmethod
    def put_on(cls, model: Any, **values: Any) -> io.NodeOutput:
        """What the node returns: `model` under these values of its widgets."""
        flux_moe(model, cls.title)
        node = cls.hidden.unique_id
        return io.NodeOutput(with_control(model, cls.node_id, None if node is None else str(node), values))


def model_output() -> io.Model.Output:
    return io.Model.Output(display_name="MODEL", tooltip="The same weights with this setting.")

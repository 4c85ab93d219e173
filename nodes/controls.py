"""Settings of one clone of a FLUX-MoE: they lie in its transformer_options, so clones share the weights."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .flux_moe import FluxMoEModel
from .settings import OPTIONS_KEY

AS_IN_FILE = "as in the file"
MOST_EXPERTS = 64  # of the widget; the paper's models have 12


def with_settings(model: Any, **settings: Any) -> Any:
    """A clone of the ModelPatcher `model` with these settings besides those it has."""
    clone = model.clone()
    options = clone.model_options.get("transformer_options", {})
    clone.model_options["transformer_options"] = {**options, OPTIONS_KEY: {**options.get(OPTIONS_KEY, {}), **settings}}
    return clone


def flux_moe(model: Any, node: str) -> FluxMoEModel:
    """The FLUX-MoE in a ModelPatcher. Raises ValueError if there is another model in it."""
    found = model.model
    if not isinstance(found, FluxMoEModel):
        raise ValueError(
            f"{node} works on a FLUX-MoE, but this MODEL is a {type(found).__name__} without experts. "
            "Connect a MODEL from Load FLUX-MoE (a dense FLUX is converted with `python -m d2m_train convert`)."
        )
    return found


class TopK(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D2MTopK",
            display_name="FLUX-MoE Top-K",
            category="FLUX-MoE",
            description=(
                "Sets how many experts every token is sent to. More experts cost more time and add detail; "
                "all of them give a converted file its dense teacher's images."
            ),
            search_aliases=["experts", "top k", "mixture of experts", "dense2moe", "flux moe speed"],
            inputs=[
                io.Model.Input("model", tooltip="From Load FLUX-MoE."),
                io.Int.Input(
                    "top_k",
                    default=2,
                    min=0,
                    max=MOST_EXPERTS,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Experts per token, 0 (the shared expert alone) up to as many as the file has (12 in the paper).",
                ),
                io.Combo.Input(
                    "gate",
                    options=[AS_IN_FILE, "sum", "normalised"],
                    default=AS_IN_FILE,
                    tooltip=(
                        "sum: every chosen expert counts whole, as in a file that was converted without training. "
                        "normalised: the router's weights, as in a distilled one."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The same weights with this setting.")],
        )

    @classmethod
    def execute(cls, model: Any, top_k: int, gate: str) -> io.NodeOutput:
        config = flux_moe(model, "FLUX-MoE Top-K").diffusion_model.config
        if config.capacity_router is not None:
            raise ValueError(
                "Top-K has no effect on this FLUX-MoE: its capacity routers give every token as many experts as it "
                "needs. Bypass this node; what steers the compute of such a file is the setting `capacity`."
            )
        if not config.ffns:
            raise ValueError(
                "Top-K has no effect on this FLUX-MoE, which has block groups and no experts. Bypass this node."
            )
        experts = min(layout.experts for layout in config.ffns.values())
        if not 0 <= top_k <= experts:
            raise ValueError(
                f"Top-K is {top_k}, but this FLUX-MoE has {experts} experts per FFN. Choose 0 to {experts}."
            )
        settings: dict[str, Any] = {"top_k": top_k}
        if gate != AS_IN_FILE:
            settings["gate"] = gate
        return io.NodeOutput(with_settings(model, **settings))

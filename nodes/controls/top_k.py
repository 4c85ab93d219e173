"""Settings of one clone of a FLUX-MoE: they lie in its transformer_options, so clones share the weights."""

from __future__ import annotations

from typing import Any, ClassVar

from comfy_api.latest import io

from ..model.flux_moe import FluxMoEModel
from ..model.settings import OPTIONS_KEY
from .evaluation_settings import at_rest, attach
from .live_values import LIVE
from .transforms import AS_IN_FILE, FOLDED, GATES, MOST_BLOCKS, MOST_CAPACITY, MOST_EXPERTS

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


class TopK(Control):
    node_id, title = "D2MTopK", "FLUX-MoE Top-K"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.node_id,
            display_name=cls.title,
            category="FLUX-MoE",
            description=(
                "Sets how many experts every token is sent to, or how much compute a file with capacity routers spends. "
                "More experts cost more time and add detail; all of them give a converted file its dense teacher's images. "
                "Move the slider while it samples: the next step follows."
            ),
            search_aliases=["experts", "top k", "capacity", "mixture of experts", "dense2moe", "flux moe speed"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TOOLTIP),
                io.Int.Input(
                    "top_k",
                    default=2,
                    min=0,
                    max=MOST_EXPERTS,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Experts per token, 0 (the shared expert alone) up to as many as the file has (12 in the paper). "
                        "Not used by files with capacity routers."
                    ),
                ),
                io.Combo.Input(
                    "gate",
                    options=[AS_IN_FILE, *GATES],
                    default=AS_IN_FILE,
                    tooltip=(
                        "sum: every chosen expert counts whole, as in a file that was converted without training. "
                        "normalised: the router's weights, as in a distilled one."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "capacity",
                    default=1.0,
                    min=0.0,
                    max=MOST_CAPACITY,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Of files with capacity routers (which give every token as many experts as it needs), in place of "
                        "top_k: 1 is the file's own, 0 no experts, 2 about twice as many. Other files do not use it."
                    ),
                    optional=True,  # workflows that were saved before there was one
                    advanced=True,
                ),
            ],
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, top_k: int, gate: str, capacity: float = 1.0) -> io.NodeOutput:
        return cls.put_on(model, top_k=top_k, gate=gate, capacity=capacity)


class ActiveBlocks(Control):
    node_id, title = "D2MActiveBlocks", "FLUX-MoE Active blocks"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.node_id,
            display_name=cls.title,
            category="FLUX-MoE",
            description=(
                "Sets how many blocks of every block group run (Mixture of Blocks: presets M, S and XS). Each sample's "
                "router chooses which; the others are skipped. Move the slider while it samples: the next step follows."
            ),
            search_aliases=["mixture of blocks", "skip blocks", "block groups", "depth", "dense2moe", "flux moe speed"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TOOLTIP),
                io.Int.Input(
                    "active_blocks",
                    default=1,
                    min=0,
                    max=MOST_BLOCKS,
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
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, active_blocks: int, per_group: str = "") -> io.NodeOutput:
        return cls.put_on(model, active_blocks=active_blocks, per_group=per_group)

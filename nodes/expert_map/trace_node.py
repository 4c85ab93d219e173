"""FLUX-MoE Trace Routing: records what the routers of a MODEL choose while it is sampled.

The clone has three wrappers, under the key "d2m_trace". OUTER_SAMPLE begins a run and adds its trace to the TRACE at
the end; the state of the run travels in transformer_options, which ComfyUI copies for every run. PREDICT_NOISE is one
evaluation: prompts and negative prompts, in one batch or one after the other. APPLY_MODEL is one call of the
transformer: it adds the recorder to the settings ("d2m"), which by then are those that the model uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ...d2m_model.config import PATCH_LATENTS, FluxMoEConfig
from ...d2m_model.trace import Evaluation, Pass, Run
from ...d2m_model.trace_record import MAX_TRACED_EXPERTS, SampleKey
from ..controls.effects import effective_settings
from ..model.call_arguments import CallArguments
from ..model.flux_moe import require_flux_moe
from ..model.settings import OPTIONS_KEY, settings_of
from .trace_store import STORE, TraceHandle

PIECES_KEY = "d2m_prompt_pieces"  # in a conditioning: the text of each of its tokens
_TRACE_KEY = "d2m_trace"  # of the wrappers, and of the run in transformer_options
_TITLE = "FLUX-MoE Trace Routing"
_MAX_RUN_BYTES = 256 * 2**20

_PART_NOTE = (
    "Parts of the image that were evaluated by themselves (tiles, windows, prompts with an area of their own) are not in the "
    "trace."
)

TraceType = io.Custom("D2M_TRACE")


class Tracer:
    """The wrappers of one clone, which keep nothing of a run."""

    def __init__(self, config: FluxMoEConfig, handle: TraceHandle) -> None:
        self.config, self.handle = config, handle

    def attach(self, model: Any) -> None:
        """Wrap the sampling of a ModelPatcher, in place of another Tracer's wrappers: a MODEL has one trace."""
        wrappers = {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREDICT_NOISE: self.predict_noise,
            WrappersMP.APPLY_MODEL: self.apply_model,
        }
        for kind, wrapper in wrappers.items():
            model.remove_wrappers_with_key(kind, _TRACE_KEY)
            model.add_wrapper_with_key(kind, _TRACE_KEY, wrapper)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        guider, call = executor.class_obj, CallArguments(args, kwargs)
        run = Run(self.config, patch_grid(call.find(0, "noise")), _MAX_RUN_BYTES)
        options = guider.model_options.setdefault("transformer_options", {})
        options[_TRACE_KEY] = run
        latents: Tensor = call.hand_on(executor)
        self.handle.add_run(run.finish(), latents)
        return latents

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = CallArguments(args, kwargs)
        model_options = call.find(2, "model_options") or {}
        options = model_options.get("transformer_options", {})
        run = options.get(_TRACE_KEY)
        if not isinstance(run, Run) or run.full:
            return call.hand_on(executor)
        evaluation = Evaluation(call.find(1, "timestep"))
        prompts = executor.class_obj.conds
        if not run.conditions:
            run.conditions = tuple(prompts)
            run.pieces = prompt_pieces(prompts, images=call.find(0, "x").shape[0])
        options = {**options, _TRACE_KEY: (run, evaluation, prompt_names(prompts))}
        call = call.replace(2, "model_options", {**model_options, "transformer_options": options})
        noise = call.hand_on(executor)
        run.end(evaluation)
        return noise

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = CallArguments(args, kwargs)
        x, c_crossattn = call.find(0, "x"), call.find(3, "c_crossattn")
        options = dict(call.find(5, "transformer_options") or {})
        state = options.get(_TRACE_KEY)
        if isinstance(state, tuple) and c_crossattn is not None:
            run, evaluation, names = state
            if not self._has_the_traced_config(executor.class_obj):
                pass  # the guider's model for negative prompts
            elif patch_grid(x) == run.grid:
                references = sum(patch_count(latents) for latents in kwargs.get("ref_latents") or ())
                samples = batch_samples(x.shape[0], options, names)
                current = Pass(samples, c_crossattn.shape[1], references)
                evaluation.passes.append(current)
                if evaluation.settings is None:
                    evaluation.settings = effective_settings(settings_of(options), self.config)
                options[OPTIONS_KEY] = {**settings_of(options), "trace": current.recorder}
                call = call.replace(5, "transformer_options", options)
            else:
                run.note(_PART_NOTE)
        return call.hand_on(executor)

    def _has_the_traced_config(self, base_model: Any) -> bool:
        """Return whether this comfy BaseModel has the configuration of the traced MODEL.

        A guider with a second model for negative prompts hands it the same transformer_options, but the blocks of
        another file do not fit into this trace.
        """
        return getattr(base_model, "moe_config", None) == self.config


def patch_grid(latents: Tensor) -> tuple[int, int]:
    """Return the height and width of latents [..., H, W] in FLUX's patches."""
    height, width = (-(-side // PATCH_LATENTS) for side in latents.shape[-2:])
    return height, width


def patch_count(latents: Tensor) -> int:
    height, width = patch_grid(latents)
    return height * width


def prompt_names(conds: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> dict[Any, tuple[str, int]]:
    """Return by prompt id what the guider calls the prompt (positive, negative) and its index among those."""
    return {
        prompt["uuid"]: (condition, entry)
        for condition, prompts in conds.items()
        for entry, prompt in enumerate(prompts or ())
        if "uuid" in prompt
    }


def batch_samples(batch: int, options: Mapping[str, Any], names: Mapping[Any, tuple[str, int]]) -> list[SampleKey]:
    """Return the samples in the rows of a batch, where ComfyUI lines up prompts, each with all images."""
    uuids = options.get("uuids") or [None]
    kinds = options.get("cond_or_uncond") or [0] * len(uuids)
    images: Sequence[int] = range(batch // len(uuids))
    window: Any = options.get("context_window")  # of Context Windows, over the batch or within the image
    if getattr(window, "dim", None) == 0:
        anchor = getattr(window, "causal_anchor_index", None)  # an image that the window has in addition
        members = [*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list]
        images = members if len(members) == len(images) else images
    prompts = [
        names.get(uuid, ("negative" if kind == 1 else "positive", 0)) for uuid, kind in zip(uuids, kinds, strict=False)
    ]
    return [SampleKey(*prompt, image) for prompt in prompts for image in images]


def prompt_pieces(conds: Mapping[str, Sequence[Mapping[str, Any]] | None], images: int) -> dict[SampleKey, list[str]]:
    """Return the texts of the prompts' tokens, where the conditioning has them."""
    return {
        SampleKey(condition, entry, image): list(prompt[PIECES_KEY])
        for condition, prompts in conds.items()
        for entry, prompt in enumerate(prompts or ())
        if PIECES_KEY in prompt
        for image in range(images)
    }


class TraceRouting(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D2MTraceRouting",
            display_name=_TITLE,
            category="FLUX-MoE",
            description=(
                "Records which experts process each patch and each word while this MODEL is sampled, and which blocks run. "
                "The Expert Map shows the result."
            ),
            search_aliases=["trace", "experts", "routing", "record", "expert map", "mixture of experts", "dense2moe"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX-MoE with its settings. Only sampling with the MODEL from this node is recorded.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The same MODEL, recorded. Connect the sampler to this one."
                ),
                TraceType.Output(
                    display_name="TRACE",
                    tooltip="The recording, for the Expert Map. Empty until the sampler has finished.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        config = require_flux_moe(model, _TITLE).moe_config
        experts = max((layout.experts for layout in config.ffns.values()), default=0)
        if experts > MAX_TRACED_EXPERTS:
            raise ValueError(
                f"This FLUX-MoE has {experts} experts per FFN; a trace can name up to {MAX_TRACED_EXPERTS}."
            )
        handle = TraceHandle(STORE, cls.hidden.unique_id or "")
        clone = model.clone()
        Tracer(config, handle).attach(clone)
        return io.NodeOutput(clone, handle)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Run again if the trace was freed, so that the MODEL is sampled anew."""
        return STORE.fingerprint(cls.hidden.unique_id)

"""FLUX-MoE Trace Routing: records what the routers of a MODEL choose while it is sampled.

Three wrappers on the clone, key "d2m_trace". OUTER_SAMPLE begins a run and, once it is through, gives its trace to the
TRACE; what the run needs to remember travels in transformer_options, which ComfyUI copies for every run. PREDICT_NOISE
is one evaluation: prompts and negative prompts, in one batch or one after the other. APPLY_MODEL is one call of the
transformer: it puts the recorder among the settings ("d2m"), which are by then those that the model really uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ...d2m_model.config import PATCH_LATENTS, FluxMoEConfig
from ...d2m_model.trace import Evaluation, Pass, Run
from ...d2m_model.trace_record import MOST_EXPERTS, SampleKey
from ..controls.effects import effective_settings
from ..model.flux_moe import require_flux_moe
from ..model.settings import OPTIONS_KEY, settings_of
from .trace_store import STORE, TraceHandle

KEY = "d2m_trace"  # of the wrappers, and of the run in transformer_options
PIECES_KEY = "d2m_prompt_pieces"  # of a conditioning: the text of each of its tokens
MOST_BYTES = 256 * 2**20  # of one run

AREAS = "Prompts with an area of their own are not in the trace."

TraceType = io.Custom("D2M_TRACE")


class Tracer:
    """The wrappers of one clone. It remembers nothing of a run."""

    def __init__(self, config: FluxMoEConfig, handle: TraceHandle) -> None:
        self.config, self.handle = config, handle

    def put_on(self, model: Any) -> None:
        """In place of another's: one MODEL has one trace."""
        wrappers = {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREDICT_NOISE: self.predict_noise,
            WrappersMP.APPLY_MODEL: self.apply_model,
        }
        for kind, wrapper in wrappers.items():
            model.remove_wrappers_with_key(kind, KEY)
            model.add_wrapper_with_key(kind, KEY, wrapper)

    def outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        run = Run(self.config, grid_of(noise), MOST_BYTES)
        options = guider.model_options.setdefault("transformer_options", {})
        options[KEY] = run
        found: Tensor = executor(noise, *args, **kwargs)
        self.handle.keep(run.finish(), found)
        return found

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None
    ) -> Any:
        model_options = model_options or {}
        options = model_options.get("transformer_options", {})
        run = options.get(KEY)
        if not isinstance(run, Run) or run.full:
            return executor(x, timestep, model_options, seed)
        evaluation = Evaluation(timestep)
        prompts = executor.class_obj.conds
        if not run.conditions:
            run.conditions, run.pieces = tuple(prompts), pieces_of(prompts, images=x.shape[0])
        options = {**options, KEY: (run, evaluation, names_of(prompts))}
        found = executor(x, timestep, {**model_options, "transformer_options": options}, seed)
        run.end(evaluation)
        return found

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        state = options.get(KEY)
        if isinstance(state, tuple) and c_crossattn is not None:
            run, evaluation, names = state
            if not self._is_of_its_file(executor.class_obj):
                pass  # a guider's other model
            elif grid_of(x) == run.grid:
                references = sum(patches_of(latents) for latents in kwargs.get("ref_latents") or ())
                rows = rows_of(x.shape[0], options, names)
                listening = Pass(rows, c_crossattn.shape[1], references)
                evaluation.passes.append(listening)
                if evaluation.settings is None:
                    evaluation.settings = effective_settings(settings_of(options), self.config)
                options[OPTIONS_KEY] = {**settings_of(options), "trace": listening.recorder}
            else:
                run.note(AREAS)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _is_of_its_file(self, base_model: Any) -> bool:
        """Whether this comfy BaseModel is of the MODEL that is traced. Guiders with a model of their own for negative
        prompts hand it the same transformer_options; another file's blocks have no place in this trace."""
        return getattr(base_model.diffusion_model, "config", None) == self.config


def grid_of(latents: Tensor) -> tuple[int, int]:
    """Patches of latents [..., H, W], as FLUX cuts them."""
    height, width = (-(-side // PATCH_LATENTS) for side in latents.shape[-2:])
    return height, width


def patches_of(latents: Tensor) -> int:
    height, width = grid_of(latents)
    return height * width


def names_of(conds: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> dict[Any, tuple[str, int]]:
    """Of every prompt by its id: what the guider calls it (positive, negative), and its place among those."""
    return {
        prompt["uuid"]: (condition, entry)
        for condition, prompts in conds.items()
        for entry, prompt in enumerate(prompts or ())
        if "uuid" in prompt
    }


def rows_of(batch: int, options: Mapping[str, Any], names: Mapping[Any, tuple[str, int]]) -> list[SampleKey]:
    """Who the rows of a batch are: ComfyUI puts prompts one after the other, each with all images."""
    uuids = options.get("uuids") or [None]
    which = options.get("cond_or_uncond") or [0] * len(uuids)
    images = batch // len(uuids)
    known = [
        names.get(uuid, ("negative" if number == 1 else "positive", 0))
        for uuid, number in zip(uuids, which, strict=False)
    ]
    return [SampleKey(*who, image) for who in known for image in range(images)]


def pieces_of(conds: Mapping[str, Sequence[Mapping[str, Any]] | None], images: int) -> dict[SampleKey, list[str]]:
    """The texts of prompts' tokens, where their conditioning carries them."""
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
            display_name="FLUX-MoE Trace Routing",
            category="FLUX-MoE",
            description=(
                "Records, while this MODEL is sampled, which experts every patch and every word was sent to, and which "
                "blocks ran. The Expert Map shows it."
            ),
            search_aliases=["trace", "experts", "routing", "record", "expert map", "mixture of experts", "dense2moe"],
            inputs=[io.Model.Input("model", tooltip="A FLUX-MoE, with its settings. Only this branch is recorded.")],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The same MODEL, recorded. Connect the sampler to this one."
                ),
                TraceType.Output(
                    display_name="TRACE",
                    tooltip="What is recorded, for the Expert Map. Empty until the sampler is through.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        config = require_flux_moe(model, "FLUX-MoE Trace Routing").diffusion_model.config
        most = max((layout.experts for layout in config.ffns.values()), default=0)
        if most > MOST_EXPERTS:
            raise ValueError(f"This FLUX-MoE has {most} experts per FFN; a trace can name up to {MOST_EXPERTS}.")
        handle = TraceHandle(STORE, cls.hidden.unique_id or "")
        clone = model.clone()
        Tracer(config, handle).put_on(clone)
        return io.NodeOutput(clone, handle)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Samples anew where the trace was freed."""
        return STORE.losses(cls.hidden.unique_id)

"""The settings of each evaluation of the model, fixed before cond and uncond, which share them.

ComfyUI calls `predict_noise` for every evaluation of a sampling run (twice a step with heun), and `outer_sample`
around the run. The state of a run is kept in the options of that run, never on the model.

These are the options of the guider's model. A guider may have another model for negative prompts (Dual Model CFG
Guider). The run of that model is kept in those prompts, which hand it to the model (see flux_moe.py).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...d2m_model.config import PATCH_LATENTS, FluxMoEConfig
from ...d2m_model.foreign import printable
from ..model.call_arguments import CallArguments
from ..model.flux_moe import FluxMoEModel
from ..model.settings import MASK_ON_DEVICE, NEGATIVE_KEY, OPTIONS_KEY, settings_of
from .effects import CONTROLLED, Moment, Settings, log_entry
from .kinds import CONTROL_KINDS
from .live_values import LIVE, ExecutingPrompt
from .metadata_log import NEGATIVE, RunLog

_WRAPPER_KEY = "d2m"
_RUN_KEY = "run"  # among the settings, during a run


class ControlRecord(TypedDict):
    """One control of a MODEL."""

    node: str | None  # execution id
    kind: str  # node id, a key of CONTROL_KINDS
    values: Mapping[str, Any]  # by widget
    settings: Settings  # of the chain up to this control, as far as they do not depend on the evaluation


def attach_wrappers(model: Any) -> None:
    """Wrap the sampling of a ModelPatcher. Once, however many controls it has."""
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, outer_sample), (WrappersMP.PREDICT_NOISE, predict_noise)):
        model.remove_wrappers_with_key(kind, _WRAPPER_KEY)
        model.add_wrapper_with_key(kind, _WRAPPER_KEY, wrapper)
    # In the options, since ComfyUI looks only there for the wrappers of a model that is not the guider's.
    options = model.model_options["transformer_options"]
    wrappers, kind = options.get("wrappers", {}), WrappersMP.PREPARE_SAMPLING
    options["wrappers"] = {**wrappers, kind: {**wrappers.get(kind, {}), _WRAPPER_KEY: [prepare_sampling]}}


def add_control(
    controls: Sequence[ControlRecord], node: str | None, kind: str, values: Mapping[str, Any], config: FluxMoEConfig
) -> tuple[ControlRecord, ...]:
    """Return the chain with one more control. Raises ValueError for a control that does not fit.

    Only the new control is applied, to what the chain had made so far: the time of a long chain would be quadratic.
    """
    earlier: Settings = controls[-1]["settings"] if controls else {}
    settings = CONTROL_KINDS[kind].apply(earlier, values, config, None)
    return (*controls, ControlRecord(node=node, kind=kind, values=values, settings=settings))


def static_settings(controls: Sequence[ControlRecord]) -> Settings:
    """Return the settings that do not depend on the evaluation, as the model reads them."""
    settings: Settings = controls[-1]["settings"] if controls else {}
    return settings | _mask_tensors(settings, None)


def _mask_tensors(settings: Settings, device: torch.device | None) -> Settings:
    """Return `mask`, if there is one, as float32 tensors on the host, and on `device` too unless it is None."""
    mask = settings.get("mask")
    if mask is None:
        return {}
    tensors = {name: torch.as_tensor(weights, dtype=torch.float32) for name, weights in mask.items()}
    if device is None:
        return {"mask": tensors}
    copied = torch.cat(list(tensors.values())).to(device)  # one copy, since the host waits for each
    parts = copied.split([len(weights) for weights in tensors.values()])
    return {"mask": tensors, MASK_ON_DEVICE: dict(zip(tensors, parts, strict=True))}


def without_controlled(settings: Mapping[str, Any]) -> Settings:
    """Return the settings that no control makes."""
    return {key: value for key, value in settings.items() if key not in (*CONTROLLED, MASK_ON_DEVICE)}


class ControlledRun:
    """One sampling run under the controls of a MODEL."""

    def __init__(
        self,
        patcher: Any,
        controls: Sequence[ControlRecord],
        sigmas: tuple[float, ...] = (),
        image_tokens: int | None = None,
    ) -> None:
        """`sigmas` and `image_tokens` are those of effects.Moment."""
        self.controls, self.sigmas, self.image_tokens = controls, sigmas, image_tokens
        self._memo: dict[Hashable, Any] = {}
        self.config: FluxMoEConfig = patcher.model.moe_config
        self.sigma_at = patcher.get_model_object("model_sampling").percent_to_sigma
        self.prompt: ExecutingPrompt | None
        self.prompt, self.node = LIVE.executing() or (None, "")
        self.log: RunLog = {
            "node": self.node,
            "controls": [control["node"] for control in controls if control["node"]],
            "evaluations": [],
            "masks": [],
            "allotments": [],
        }
        self._mask: tuple[Any, Settings] = (None, {})

    def next_settings(self, sigma: float, device: torch.device) -> Settings:
        """Return and log the settings of the next evaluation."""
        evaluation = len(self.log["evaluations"])
        moment = Moment(
            evaluation=evaluation, sigma=sigma, sigma_at=self.sigma_at,
            sigmas=self.sigmas, image_tokens=self.image_tokens, memo=self._memo,
        )  # fmt: skip
        live_values = LIVE.values(self.prompt)
        settings: Settings = {}
        for control in self.controls:
            settings = self._apply(settings, control, live_values.get(control["node"] or ""), moment)
        entry = log_entry(settings, self.config, self.log["masks"], self.log["allotments"])
        self.log["evaluations"].append({"evaluation": evaluation, "sigma": float(f"{sigma:.6g}"), **entry})
        if "mask" in settings:
            if self._mask[0] != settings["mask"]:  # moved to the device once, not for every evaluation
                self._mask = (settings["mask"], _mask_tensors(settings, device))
            settings |= self._mask[1]
        return settings

    def _apply(
        self, settings: Settings, control: ControlRecord, live: dict[str, Any] | None, moment: Moment
    ) -> Settings:
        """Apply a control with its live values; if these do not fit the file, with its last that did."""
        apply, queued, node = CONTROL_KINDS[control["kind"]].apply, control["values"], control["node"] or ""
        if live is None or self.prompt is None:
            return apply(settings, queued, self.config, moment)
        try:
            changed = apply(settings, {**queued, **live}, self.config, moment)
        except ValueError as error:
            self._warn(printable(f"FLUX-MoE: node {node} keeps its last value. {error}"))
            return apply(settings, {**queued, **self.prompt.last_valid.get(node, {})}, self.config, moment)
        self.prompt.last_valid[node] = live
        return changed

    def _warn(self, message: str) -> None:
        assert self.prompt is not None
        if message not in self.prompt.warnings:
            self.prompt.warnings.add(message)
            logging.warning(message)

    def end(self) -> None:
        """Warn if the run was not as long as a replayed log."""
        made = len(self.log["evaluations"])
        for control in self.controls:
            if control["kind"] == "D2MReplay" and made != (logged := len(control["values"]["log"]["evaluations"])):
                rest = "the last settings stayed after its end" if made > logged else "the rest was not used"
                logging.warning(
                    f"FLUX-MoE: the replayed log has {logged} evaluations and this run made {made}; {rest}. Sample with "
                    "the steps, sampler and scheduler of the log for the same image."
                )


class NegativePromptRun(ControlledRun):
    """The run of a model that evaluates negative prompts alone: each of them once per evaluation."""

    def __init__(self, patcher: Any, sigmas: tuple[float, ...] = (), image_tokens: int | None = None) -> None:
        self.own = settings_of(patcher.model_options.get("transformer_options"))
        super().__init__(patcher, self.own.get("controls", ()), sigmas, image_tokens)
        self.log["model"] = NEGATIVE
        self._current: tuple[float, set[Any], Settings] = (0.0, set(), {})  # sigma, prompts so far, settings

    def settings(self, options: Mapping[str, Any], sigmas: Tensor, device: torch.device) -> Settings:
        """Return the settings of one call of the model, in place of the guider's model's, which are in `options`.

        An evaluation may take several calls. A new one begins with another sigma or when a prompt comes again.
        """
        sigma, prompts = float(sigmas.reshape(-1)[0]), set(options.get("uuids") or [None])
        current_sigma, earlier, settings = self._current
        if sigma != current_sigma or not earlier or prompts & earlier:
            base = without_controlled(self.own) if self.controls else self.own
            earlier, settings = set(), {**base, **self.next_settings(sigma, device)}
        self._current = (sigma, earlier | prompts, settings)
        guider_settings = settings_of(options)
        # A trace knows the routers of the guider's model, so it may only record a model with the same configuration.
        same = _RUN_KEY in guider_settings and guider_settings[_RUN_KEY].config is self.config
        return {**settings, "trace": guider_settings["trace"]} if same and "trace" in guider_settings else settings


def _hand_over(conds: Sequence[dict[str, Any]] | None, run: NegativePromptRun) -> None:
    """Have these prompts, copies that belong to one run, evaluated under `run`."""
    for cond in conds or ():
        cond[NEGATIVE_KEY] = run


def _image_tokens(noise: Tensor) -> int | None:
    """Return the image tokens of latents [B, channels, height, width]; None for latents of another form."""
    if getattr(noise, "ndim", 0) != 4:
        return None
    return -(-noise.shape[2] // PATCH_LATENTS) * -(-noise.shape[3] // PATCH_LATENTS)


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap a sampling run: begin its log, and end it if the run does not fail."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})  # a copy for this run
    call = CallArguments(args, kwargs)
    sigmas, image_tokens = tuple(call.find(3, "sigmas").tolist()), _image_tokens(call.find(0, "noise"))
    run = ControlledRun(guider.model_patcher, settings_of(options).get("controls", ()), sigmas, image_tokens)
    options[OPTIONS_KEY] = {**settings_of(options), _RUN_KEY: run}
    negative_model = getattr(guider, "uncond_model_patcher", None)
    if negative_model is not None and isinstance(negative_model.model, FluxMoEModel):
        _hand_over(guider.conds.get("negative"), NegativePromptRun(negative_model, sigmas, image_tokens))
    LIVE.begin(run.prompt, run.node, run.log)
    sampled = executor(*args, **kwargs)
    run.end()
    LIVE.end(run.prompt, run.node, run.log)
    return sampled


def prepare_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap the preparation of each model of a guider, which comes with the options of that model."""
    call = CallArguments(args, kwargs)
    options = (call.find(3, "model_options") or {}).get("transformer_options", {})
    if _RUN_KEY not in settings_of(options):  # not the guider's own model, whose options have a run by now
        run = NegativePromptRun(call.find(0, "model"))
        for prompts in call.find(2, "conds").values():
            _hand_over(prompts, run)
        LIVE.begin(run.prompt, run.node, run.log)
        # This model has no hook at the end of a run, so its log is ended here. A run that fails makes no image.
        LIVE.end(run.prompt, run.node, run.log)
    return call.hand_on(executor)


def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap one evaluation of the guider's model: put its settings into a copy of the options."""
    call = CallArguments(args, kwargs)
    x, timestep, model_options = call.find(0, "x"), call.find(1, "timestep"), call.find(2, "model_options") or {}
    options = model_options.get("transformer_options", {})
    settings = settings_of(options)
    run = settings.get(_RUN_KEY)
    if run is not None:  # else another pack evaluates the model without sampling
        settings = without_controlled(settings) | run.next_settings(float(timestep.reshape(-1)[0]), x.device)
        fixed = {**model_options, "transformer_options": {**options, OPTIONS_KEY: settings}}
        call = call.replace(2, "model_options", fixed)
    return call.hand_on(executor)

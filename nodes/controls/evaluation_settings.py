"""What the controls of a MODEL say is latched once per evaluation of the model: before cond and uncond, which share it.

ComfyUI calls `predict_noise` for every evaluation of a run (twice a step with heun), `outer_sample` around the run. A
run's state lies in the options of that one run: nothing is kept on the model.

Options are those of the guider's model. A guider may have another model for negative prompts (Dual Model CFG Guider):
its run lies in those prompts, which tell the model by it (flux_moe.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...d2m_model.config import FluxMoEConfig
from ..model.flux_moe import FluxMoEModel
from ..model.settings import NEGATIVE_KEY, OPTIONS_KEY, settings_of
from .live_values import LIVE, Prompt
from .metadata_log import NEGATIVE
from .transforms import FOLDED, KINDS, Moment, Settings, logged

WRAPPER_KEY = "d2m"
RUN = "run"  # of the settings within a run

Control = dict[str, Any]  # a record: see settings.py


def attach(model: Any) -> None:
    """Once per ModelPatcher, however many controls it has."""
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, outer_sample), (WrappersMP.PREDICT_NOISE, predict_noise)):
        model.remove_wrappers_with_key(kind, WRAPPER_KEY)
        model.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    # Among the options, for a model that is not the guider's: of such a one ComfyUI asks for no others.
    options = model.model_options["transformer_options"]
    wrappers, kind = options.get("wrappers", {}), WrappersMP.PREPARE_SAMPLING
    options["wrappers"] = {**wrappers, kind: {**wrappers.get(kind, {}), WRAPPER_KEY: [prepare_sampling]}}


def at_rest(controls: tuple[Control, ...], config: FluxMoEConfig) -> Settings:
    """What holds whatever the evaluation. Raises ValueError for a control that the file cannot follow."""
    settings: Settings = {}
    for control in controls:
        settings = KINDS[control["kind"]].fold(settings, control["values"], config, None)
    return settings | mask_tensors(settings, None)


def mask_tensors(settings: Settings, device: torch.device | None) -> Settings:
    """The `mask` of settings as the model reads it."""
    mask = settings.get("mask")
    if mask is None:
        return {}
    return {
        "mask": {name: torch.as_tensor(weights, dtype=torch.float32, device=device) for name, weights in mask.items()}
    }


def unfolded(settings: Mapping[str, Any]) -> Settings:
    """What of a clone's settings no fold makes."""
    return {key: value for key, value in settings.items() if key not in FOLDED}


class Run:
    """One sampling run under the controls of a MODEL."""

    def __init__(self, patcher: Any, controls: tuple[Control, ...]) -> None:
        self.controls = controls
        self.config: FluxMoEConfig = patcher.model.diffusion_model.config
        self.sigma_at = patcher.get_model_object("model_sampling").percent_to_sigma
        self.prompt: Prompt | None
        self.prompt, self.node = LIVE.executing() or (None, "")
        self.log: dict[str, Any] = {
            "node": self.node,
            "controls": [control["node"] for control in controls if control["node"]],
            "evaluations": [],
            "masks": [],
        }
        self._mask: tuple[Any, dict[str, Tensor]] = (None, {})

    def latch(self, sigma: float, device: torch.device) -> Settings:
        """The settings of the next evaluation."""
        evaluation = len(self.log["evaluations"])
        moment = Moment(evaluation=evaluation, sigma=sigma, sigma_at=self.sigma_at)
        live = LIVE.values(self.prompt)
        settings: Settings = {}
        for control in self.controls:
            settings = self._fold(settings, control, live.get(control["node"]), moment)
        self.log["evaluations"].append(
            {
                "evaluation": evaluation,
                "sigma": float(f"{sigma:.6g}"),
                **logged(settings, self.config, self.log["masks"]),
            }
        )
        if "mask" in settings:  # on the device once, not for every evaluation
            if self._mask[0] != settings["mask"]:
                self._mask = (settings["mask"], mask_tensors(settings, device)["mask"])
            settings["mask"] = self._mask[1]
        return settings

    def _fold(self, settings: Settings, control: Control, live: dict[str, Any] | None, moment: Moment) -> Settings:
        fold, queued = KINDS[control["kind"]].fold, control["values"]
        if live is None or self.prompt is None:
            return fold(settings, queued, self.config, moment)
        try:
            found = fold(settings, {**queued, **live}, self.config, moment)
        except ValueError as error:
            self._warn(f"FLUX-MoE: node {control['node']} keeps its last value. {error}")
            return fold(settings, {**queued, **self.prompt.fitting.get(control["node"], {})}, self.config, moment)
        self.prompt.fitting[control["node"]] = live
        return found

    def _warn(self, message: str) -> None:
        assert self.prompt is not None
        if message not in self.prompt.warned:
            self.prompt.warned.add(message)
            logging.warning(message)

    def end(self) -> None:
        made = len(self.log["evaluations"])
        for control in self.controls:
            if control["kind"] == "D2MReplay" and made != (held := len(control["values"]["log"]["evaluations"])):
                after = "the last ones' settings held beyond its end" if made > held else "the rest was not used"
                logging.warning(
                    f"FLUX-MoE: the replayed log has {held} evaluations and this run made {made}; {after}. Sample with "
                    "the steps, sampler and scheduler of the log for the same image."
                )


class NegativeRun(Run):
    """The run of a model that evaluates negative prompts alone. Each of them is evaluated once in an evaluation."""

    def __init__(self, patcher: Any) -> None:
        self.own = settings_of(patcher.model_options.get("transformer_options"))
        super().__init__(patcher, self.own.get("controls", ()))
        self.log["model"] = NEGATIVE
        self._now: tuple[float, set[Any], Settings] = (0.0, set(), {})

    def settings(self, options: Mapping[str, Any], sigmas: Tensor, device: torch.device) -> Settings:
        """Of one call of the model, in place of those that the guider's model has in `options`."""
        sigma, called = float(sigmas.reshape(-1)[0]), set(options.get("uuids") or [None])
        latched_at, before, settings = self._now
        if sigma != latched_at or not before or called & before:
            latched = self.latch(sigma, device)
            before, settings = set(), {**(unfolded(self.own) if self.controls else self.own), **latched}
        self._now = (sigma, before | called, settings)
        guiders = settings_of(options)
        # A trace knows the routers of the guider's model: it may listen where that has these weights.
        same = RUN in guiders and guiders[RUN].config is self.config
        return {**settings, "trace": guiders["trace"]} if same and "trace" in guiders else settings


def mark_negative(conds: Sequence[dict[str, Any]] | None, run: NegativeRun) -> None:
    """These prompts, copies of one run, are evaluated under `run`."""
    for cond in conds or ():
        cond[NEGATIVE_KEY] = run


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})  # of this run alone
    run = Run(guider.model_patcher, settings_of(options).get("controls", ()))
    options[OPTIONS_KEY] = {**settings_of(options), RUN: run}
    other = getattr(guider, "uncond_model_patcher", None)
    if other is not None and isinstance(other.model, FluxMoEModel):
        mark_negative(guider.conds.get("negative"), NegativeRun(other))
    LIVE.begin(run.prompt, run.node, run.log)
    found = executor(*args, **kwargs)
    run.end()
    LIVE.end(run.prompt, run.node, run.log)
    return found


def prepare_sampling(
    executor: Any, model: Any, noise_shape: Any, conds: Mapping[str, Any], model_options: Any = None, **kwargs: Any
) -> Any:
    """Comes for each model of a guider, with the options of that model."""
    options = (model_options or {}).get("transformer_options", {})
    if RUN not in settings_of(options):  # which the guider's has by now
        run = NegativeRun(model)
        for prompts in conds.values():
            mark_negative(prompts, run)
        LIVE.begin(run.prompt, run.node, run.log)
        LIVE.end(run.prompt, run.node, run.log)  # none says when it is through; where it fails there is no image
    return executor(model, noise_shape, conds, model_options, **kwargs)


def predict_noise(
    executor: Any, x: Tensor, timestep: Tensor, model_options: Mapping[str, Any] = {}, seed: int | None = None
) -> Any:
    options = model_options.get("transformer_options", {})
    known = settings_of(options)
    run = known.get(RUN)
    if run is None:  # another pack evaluates without sampling
        return executor(x, timestep, model_options, seed)
    settings = unfolded(known) | run.latch(float(timestep.reshape(-1)[0]), x.device)
    latched = {**model_options, "transformer_options": {**options, OPTIONS_KEY: settings}}
    return executor(x, timestep, latched, seed)

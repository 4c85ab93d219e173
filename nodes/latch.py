"""What the controls of a MODEL say is latched once per evaluation of the model: before cond and uncond, which share it.

ComfyUI calls `predict_noise` for every evaluation of a run (twice a step with heun), `outer_sample` around the run. A
run's state lies in the options of that one run: nothing is kept on the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..d2m_model.config import FluxMoEConfig
from .folds import FOLDED, KINDS, Moment, Settings, logged
from .live import LIVE, Prompt
from .settings import OPTIONS_KEY, settings_of

WRAPPER_KEY = "d2m"
RUN = "run"  # of the settings within a run

Control = dict[str, Any]  # a record: see settings.py


def attach(model: Any) -> None:
    """Once per ModelPatcher, however many controls it has."""
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, outer_sample), (WrappersMP.PREDICT_NOISE, predict_noise)):
        model.remove_wrappers_with_key(kind, WRAPPER_KEY)
        model.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)


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


class Run:
    """One sampling run under the controls of a MODEL."""

    def __init__(self, guider: Any, controls: tuple[Control, ...]) -> None:
        self.controls = controls
        self.config: FluxMoEConfig = guider.model_patcher.model.diffusion_model.config
        self.sigma_at = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
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


def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})  # of this run alone
    run = Run(guider, settings_of(options).get("controls", ()))
    options[OPTIONS_KEY] = {**settings_of(options), RUN: run}
    LIVE.begin(run.prompt, run.node, run.log)
    found = executor(*args, **kwargs)
    run.end()
    LIVE.end(run.prompt, run.node, run.log)
    return found


def predict_noise(
    executor: Any, x: Tensor, timestep: Tensor, model_options: Mapping[str, Any] = {}, seed: int | None = None
) -> Any:
    options = model_options.get("transformer_options", {})
    known = settings_of(options)
    run = known.get(RUN)
    if run is None:  # another pack evaluates without sampling
        return executor(x, timestep, model_options, seed)
    settings = {key: value for key, value in known.items() if key not in FOLDED}
    settings |= run.latch(float(timestep.reshape(-1)[0]), x.device)
    latched = {**model_options, "transformer_options": {**options, OPTIONS_KEY: settings}}
    return executor(x, timestep, latched, seed)

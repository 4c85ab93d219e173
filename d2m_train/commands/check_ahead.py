"""Checks of a run before its hours begin: whatever would stop a later stage and can be known at once."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from d2m_model.config import FluxDims

from .. import UserError
from ..distillation.stages import TRAINING, plan_stage, trainable_names, trainable_stages
from ..plan.activations import optional_names
from ..plan.estimate import student_config
from ..run_config import RunConfig
from ..training.compiling import compile_backend


def check_ahead(run: RunConfig, teacher: FluxDims) -> None:
    """Raise UserError or ConfigError for options that cannot be met: packages, backends, students, trainable patterns."""
    stages = [stage for stage in run.stages if stage in TRAINING and getattr(run.stage, stage).steps > 0]
    if stages:
        _check_packages(run)
        compile_backend(run.training.compile)
    config = student_config(run, teacher)
    for stage in stages:
        section = getattr(run.stage, stage)
        if section.trainable is not None and stage in trainable_stages(config):
            from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

            with torch.device("meta"):
                model = FluxMoETransformer2DModel(config, optional_names(run, config))
            trainable_names(model, plan_stage(stage, config, section))


def _check_packages(run: RunConfig) -> None:
    """Raise UserError for a missing package."""
    needed = [("tensorboard", "training writes TensorBoard's logs", "pip install tensorboard")]
    if run.eyes.wandb:
        needed.append(("wandb", "eyes.wandb is true", "pip install wandb, or eyes.wandb=false"))
    if run.training.optimizer == "adamw_8bit":
        needed.append(
            (
                "bitsandbytes",
                "training.optimizer is adamw_8bit",
                "pip install bitsandbytes, or training.optimizer=adamw_fused",
            )
        )
    if run.teacher.quantise is not None:
        quantise = f"teacher.quantise is {run.teacher.quantise}"
        needed.append(("torchao", quantise, "pip install 'dense2moe-flux[train,quantise]'"))
    for package, reason, remedy in needed:
        if find_spec(package) is None:
            raise UserError(f"{reason}, but {package} is not installed: {remedy}.")

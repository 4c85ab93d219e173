"""The node Convert FLUX to MoE: converts the dense FLUX.1 in a MODEL to a FLUX-MoE, without training.

The FLUX-MoE is written to a file in ComfyUI's temporary folder, tensor by tensor, and mapped from there, so that there
are never two copies of the weights in memory. The file is deleted with the last MODEL that uses it; Save FLUX-MoE keeps
a copy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ...d2m_model.checkpoint import CheckpointError
from ...d2m_model.config import FluxMoEConfig
from ...d2m_model.conversion.calibration import Calibration
from ...d2m_model.conversion.convert import convert_file
from ...d2m_model.conversion.method import Method, new_config, resolved
from ...d2m_model.conversion.new_tensors import block_group_tensors, fitted_modulations, planner
from ...d2m_model.conversion.options import OPTIONS, method_arguments, with_defaults
from ...d2m_model.routers import KINDS
from ...d2m_model.tensor_file import FLOAT8
from ..cost import remember_model
from ..model.flux_moe import require_link
from ..model.unloading import unload_patches
from .calibration import TOKENS_PER_FFN, CalibrationSamples, calibrate_on_prompts, sampling_patches, split_prompts
from .dense_teacher import open_dense, refuse_others
from .load_node import load_flux_moe
from .save_node import baking_note, weight_patches

_NAME = "Convert FLUX to MoE"
_FITTED, _RANDOM = "fitted to the prompts", "random"
_PERCENT = 100  # length of the progress bar; calibration, if there is one, takes half of it
_GUIDANCE_HOOKS = "sampler_"  # prefix of the entries of model_options with which nodes change guidance
_FILE_OVERHEAD = 1.03  # size of the file relative to the teacher's: routers, means and the header


def conversion_method(
    *, preset: str, split_only: bool, router: str, block_routers_init: str, top_k: int, seed: int, calibrated: bool
) -> Method:
    """Choose as `python -m d2m_train convert` does with data and without, with activation in place of Taylor importance."""
    values = {
        "preset": preset,
        "router_kind": router,
        "block_router": None if block_routers_init == _FITTED else "random",
        "importance": "activation" if calibrated else None,
        "refit": False if split_only else None,
        "adaln_rank": "none" if split_only else None,
        "top_k": top_k,
        "seed": seed,
    }
    method = Method(**method_arguments(with_defaults(values, calibrated=calibrated)))
    if not calibrated and KINDS[method.router].needs_data:
        raise ValueError(
            f"{_NAME}: {router} routers have to be fitted to the model. Connect calibration prompts, or choose router top_k."
        )
    if not calibrated and preset != "L" and block_routers_init == _FITTED:
        raise ValueError(
            f"{_NAME}: the block routers of preset {preset} have to be fitted to the model. Connect calibration prompts "
            f"(a CONDITIONING; a dozen combined ones work well), choose preset L, or set block_routers to {_RANDOM}: such a "
            "model has to be trained before it paints well."
        )
    return resolved(method)


class ConversionProgress:
    """The node's progress bar, in percent. Every update also checks whether the user has cancelled."""

    def __init__(self, evaluations: int) -> None:
        self._bar = comfy.utils.ProgressBar(_PERCENT)
        self._per_evaluation = _PERCENT / 2 / evaluations if evaluations else 0.0
        self._left = _PERCENT / 2 if evaluations else _PERCENT
        self._done = 0.0

    def evaluated(self) -> None:
        self._add(self._per_evaluation)

    def converted(self, part: float) -> None:
        self._add(part * self._left)

    def _add(self, percent: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += percent
        self._bar.update_absolute(round(self._done))


def convert_model(
    model: Any, method: Method, conditioning: Any | None, settings: CalibrationSamples, target: Path
) -> FluxMoEConfig:
    """Write the FLUX-MoE of `model` to `target`; without a conditioning everything is derived from the weights.

    Raises ValueError (or its subclass CheckpointError) for unsuitable models and full disks, InterruptProcessingException
    when the user cancels. Nothing incomplete is left behind.
    """
    with open_dense(model) as (teacher, about), calibration_folder(target) as folder:
        data, prompts = None, None
        if conditioning is not None:
            prompts = split_prompts(conditioning)
            settings = replace(settings, samples=max(settings.samples, len(prompts)))
            data = {"name": f"{len(prompts)} prompts in ComfyUI", "samples": settings.samples, "steps": settings.steps}
        dims = teacher.dims
        config = new_config(method, dims, about, data)
        if patches := weight_patches(model):
            config = replace(config, provenance=config.provenance | {"baked": [baking_note(patches)]})
        kept = 0 if prompts is None else 4 * TOKENS_PER_FFN * dims.hidden_size * len(config.ffns)
        check_space(target.parent, round(_FILE_OVERHEAD * teacher.size) + kept)
        progress = ConversionProgress(0 if prompts is None else settings.evaluations)
        calibration: Calibration | None = None
        if prompts is not None:
            calibration = calibrate_on_prompts(model, config, prompts, settings, folder, progress.evaluated)
        unload_patches(model)  # takes its patches out of the weights, and frees the device's memory for fits
        # ComfyUI runs nodes in inference mode, in which capacity routers could not be fitted by gradients.
        with torch.inference_mode(False), torch.no_grad():
            return convert_file(
                teacher,
                target,
                config,
                planner(method, config, calibration, {}, device=comfy.model_management.get_torch_device()),
                modulations=fitted_modulations(teacher.tensor, config, calibration),
                router_bias=method.recipe.router == "ridge",
                expert_mean=method.recipe.mean,
                block_groups=block_group_tensors(method, config, calibration, {}, {}),
                progress=lambda done: progress.converted(done / teacher.size),
            )


@contextmanager
def calibration_folder(target: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Check for disk space before minutes of calibration. Raises CheckpointError."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{_NAME} writes the FLUX-MoE to ComfyUI's temporary folder {folder}: {needed:,} bytes are needed, {free:,} are "
            f"free. {earlier_conversions()}Make room, or start ComfyUI with --temp-directory on another disk."
        )


def earlier_conversions() -> str:
    """Describe the disk space of earlier conversions: ComfyUI caches a MODEL, and so its file, for each seed, preset, ..."""
    sizes = []
    for file in list(_FILES):
        with suppress(OSError):  # not written yet
            sizes.append(file.path.stat().st_size)
    if not sizes:
        return ""
    return (
        f"{len(sizes)} earlier conversion{'s' if len(sizes) > 1 else ''} that ComfyUI still holds "
        f"take{'' if len(sizes) > 1 else 's'} {sum(sizes):,} bytes there: Edit > Unload Models and Execution Cache lets go "
        "of all that no workflow is running with. "
    )


# The result


class TemporaryFile:
    """A file that is deleted with the last MODEL that is, or can be, loaded from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, _remove, path)
        _FILES.add(self)


_FILES: weakref.WeakSet[TemporaryFile] = weakref.WeakSet()  # this process's files that are still in use


def _remove(path: Path) -> None:
    with suppress(OSError):  # Windows does not delete mapped files; ComfyUI clears the folder when it ends
        os.unlink(path)


def load_temporary(file: TemporaryFile, model_options: dict[str, Any], disable_dynamic: bool = False) -> Any:
    """Load a file as load_flux_moe does. ComfyUI can load it again, so the file lives as long as the MODEL and its clones."""
    model = load_flux_moe(str(file.path), model_options, disable_dynamic)
    model.cached_patcher_init = (load_temporary, (file, model_options))
    return model


def copy_settings(model: Any, converted: Any) -> Any:
    """Copy settings of `model` to `converted` that also suit a FLUX-MoE, and return it.

    These are patches of noise levels, as by ModelSamplingFlux, and hooks on guidance. Patches and compiled graphs of the
    dense model's blocks are not copied.
    """
    for key, patch in sampling_patches(model).items():
        converted.add_object_patch(key, patch)
    for key, value in model.model_options.items():
        if key.startswith(_GUIDANCE_HOOKS) or key == "disable_cfg1_optimization":
            converted.model_options[key] = list(value) if isinstance(value, list) else value
    return converted


class ConvertFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D2MConvertFlux",
            display_name=_NAME,
            category="FLUX-MoE",
            description=(
                "Turns a dense FLUX.1 into a FLUX-MoE without training: a shared expert and twelve routed ones in every "
                "feed-forward network. With calibration prompts the model itself is asked what matters, and two of the "
                "twelve experts come much closer to it. LoRAs on the MODEL become part of the weights. Save FLUX-MoE keeps "
                "the result."
            ),
            search_aliases=[
                "convert",
                "dense2moe",
                "flux moe",
                "mixture of experts",
                "dense to moe",
                "prune",
                "speed up",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A dense FLUX.1 from any loader, in bfloat16, float16, float32 or float8; with LoRAs or without.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(OPTIONS["preset"].choices),
                    default=OPTIONS["preset"].default,
                    tooltip=(
                        "L: experts in all blocks but the first. M: of groups of double blocks one runs at a time; S and XS: "
                        "of single blocks too. Smaller is faster, and further from the dense model."
                    ),
                ),
                io.Boolean.Input(
                    "split_only",
                    default=False,
                    tooltip=(
                        "Leave the weights as they are, reordered: with all experts it is the dense model, bit for bit in its "
                        "weights. Off, two experts come closer, and the modulations are compressed."
                    ),
                ),
                io.Conditioning.Input(
                    "calibration",
                    optional=True,
                    tooltip=(
                        "Prompts that the model paints to find out what matters: a dozen or more that differ, joined by "
                        "Conditioning (Combine). Without them the weights alone decide."
                    ),
                ),
                io.Int.Input(
                    "samples",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip=(
                        "Images that are painted for calibration, prompt after prompt, one of each at least. More fit better "
                        "and take longer."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Sampling steps of each of these images; 4 are right for schnell.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Pixels on the side of these images. Smaller is quicker; 128 is right for the emoji FLUX.",
                ),
                io.Int.Input(
                    "seed",
                    default=OPTIONS["seed"].default,
                    min=0,
                    max=0xFFFF_FFFF,
                    control_after_generate=False,
                    tooltip="Of the calibration's noise and of all that is drawn in converting.",
                ),
                io.Int.Input(
                    "top_k",
                    default=OPTIONS["top_k"].default,
                    min=OPTIONS["top_k"].minimum,
                    max=12,
                    tooltip="Experts of a token for which routers and weights are fitted. FLUX-MoE Top-K runs any other.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "router",
                    options=list(OPTIONS["router_kind"].choices),
                    default=OPTIONS["router_kind"].default,
                    tooltip=(
                        "top_k: every token has as many experts. capacity (DiffMoE): tokens that need more get more, so many "
                        "on average; needs calibration prompts."
                    ),
                    advanced=True,
                ),
                io.Combo.Input(
                    "block_routers",
                    options=[_FITTED, _RANDOM],
                    default=_FITTED,
                    tooltip="How presets M, S and XS choose blocks: as calibration says, or at random, to be trained.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The FLUX-MoE. It lies in a temporary file until Save FLUX-MoE keeps it.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        split_only: bool,
        samples: int,
        steps: int,
        size: int,
        seed: int,
        top_k: int,
        router: str,
        block_routers: str,
        calibration: Any = None,
    ) -> io.NodeOutput:
        method = conversion_method(
            preset=preset,
            split_only=split_only,
            router=router,
            block_routers_init=block_routers,
            top_k=top_k,
            seed=seed,
            calibrated=calibration is not None,
        )
        refuse_others(model, _NAME)
        require_link(calibration, (list, type(None)), _NAME, "calibration")
        settings = CalibrationSamples(samples=samples, steps=steps, size=size // 16 * 16, seed=seed)
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        file = TemporaryFile(folder / f"flux-moe-{uuid.uuid4().hex}.safetensors")
        remember_model(convert_model(model, method, calibration, settings, file.path))
        earlier_conversions = model.model.diffusion_model.dtype
        converted = load_temporary(file, {"dtype": earlier_conversions} if earlier_conversions in FLOAT8 else {})
        return io.NodeOutput(copy_settings(model, converted))

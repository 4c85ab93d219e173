"""The node Save FLUX-MoE: writes a MODEL, with its LoRAs, to a file.

The file is written tensor by tensor. ComfyUI computes a patched weight when it is written, as it does for sampling: the
file has the weights that were sampled with, and there is never a second copy of the model.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io, ui
from torch import Tensor

from ...d2m_model.checkpoint import (
    CONFIG_KEY,
    CheckpointError,
    check_file,
    check_moe,
    config_tensor,
    expected_tensors,
    optional_tensors,
)
from ...d2m_model.config import FluxMoEConfig
from ...d2m_model.conversion.convert import file_metadata
from ...d2m_model.keys import bfl_spelling
from ...d2m_model.quantised import is_companion
from ...d2m_model.tensor_writer import TensorWriter
from ..controls.budget import Budget
from ..controls.expert_mask import ExpertMask
from ..controls.replay import Replay
from ..controls.schedule import Schedule
from ..controls.widget_text import parse_mask, parse_schedule
from ..model.flux_moe import TRANSFORMER_PREFIX, require_flux_moe
from ..model.settings import active_blocks, router_value, settings_of
from ..model.unloading import patched_weight, unload_patches
from .injections import refuse_injections, require_flux, warn_of_foreign

_NAME = "Save FLUX-MoE"
_PREFIX = "diffusion_models/FLUX-MoE"
_MAX_NAME = 200  # bytes of a file's or folder's name; systems take 255, with the number and the part file's ending
_BAKED = (
    "Patches (LoRAs) are baked into its weights, which are otherwise the teacher's with reordered FFN neurons: "
    "without the pack it opens and samples as the dense teacher with these patches."
)

_WORKFLOW_CONTROLS = {kind.node_id: kind.title for kind in (Budget, ExpertMask, Replay, Schedule)}

_Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each tensor of a file


def own_tensors(patcher: Any) -> dict[str, Tensor]:
    """Return the tensors of the transformer that its file has, by name in the transformer, without those of other packs."""
    config: FluxMoEConfig = patcher.model.moe_config
    known = {CONFIG_KEY: (), **expected_tensors(config), **optional_tensors(config)}
    return {
        name: tensor
        for name, tensor in patcher.model.diffusion_model.state_dict().items()
        if (spelled := bfl_spelling(name)) in known or is_companion(spelled, known)
    }


def file_specs(patcher: Any) -> _Specs:
    """Return dtype and shape of each tensor of this MODEL's file, by BFL name."""
    specs: _Specs = {}
    for name, tensor in own_tensors(patcher).items():
        key, shape = f"{TRANSFORMER_PREFIX}{name}", tuple(tensor.shape)
        if key in patcher.patches and not isinstance(comfy.utils.get_attr(patcher.model, key), QuantizedTensor):
            shape = tuple(comfy.lora.calculate_shape(patcher.patches[key], tensor, key))
        specs[bfl_spelling(name)] = (as_loadable(tensor).dtype, shape)
    return specs


def file_tensors(patcher: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of this MODEL's file, one at a time.

    Quantised weights stay quantised, patched ones with a new scale. A capacity that is set scales the thresholds.
    """
    written: set[str] = set()
    config: FluxMoEConfig = patcher.model.moe_config
    value = router_value(config, settings_of(patcher.model_options.get("transformer_options")))
    for name, tensor in own_tensors(patcher).items():
        if name in written:
            continue
        pieces: Mapping[str, Tensor] = {name: tensor}
        if (saved := config.router.saved(name, tensor, value)) is not tensor:
            pieces = {name: saved}
        elif f"{TRANSFORMER_PREFIX}{name}" in patcher.patches:
            weight = patched_weight(patcher, f"{TRANSFORMER_PREFIX}{name}")
            pieces = weight.state_dict(name) if isinstance(weight, QuantizedTensor) else {name: weight}
        for piece, values in pieces.items():
            written.add(piece)
            yield bfl_spelling(piece), as_loadable(values)


def as_loadable(tensor: Tensor) -> Tensor:
    """Return scales of dtype float8_e8m0fnu, which not every loader of safetensors knows, as bytes: ComfyUI reads both."""
    return tensor.view(torch.uint8) if tensor.dtype == getattr(torch, "float8_e8m0fnu", None) else tensor


def weight_patches(patcher: Any) -> dict[str, list]:
    """Return the patches of the transformer, by tensor name in the MODEL."""
    return {key: found for key, found in patcher.patches.items() if key.startswith(TRANSFORMER_PREFIX) and found}


def controls_without_file(patcher: Any) -> list[str]:
    """Return names of controls whose settings no file has: those for single experts, or for a part of sampling."""
    names = []
    for control in settings_of(patcher.model_options.get("transformer_options")).get("controls", ()):
        kind, values, node = control["kind"], control["values"], control["node"]
        if kind == Schedule.node_id and not parse_schedule(values["pieces"]):
            continue
        if kind == ExpertMask.node_id and not parse_mask(values["mask"]):
            continue
        if kind in _WORKFLOW_CONTROLS:
            names.append(f"{_WORKFLOW_CONTROLS[kind]} (node {node})" if node else _WORKFLOW_CONTROLS[kind])
    return names


def baking_note(patches: Mapping[str, list]) -> dict[str, Any]:
    """Return the provenance of patches that are baked in."""
    strengths = sorted({float(patch[0]) for of_tensor in patches.values() for patch in of_tensor})
    return {"tensors": len(patches), "strengths": strengths}


def saved_config(patcher: Any, specs: _Specs) -> FluxMoEConfig:
    """Return the file's configuration, with this MODEL's Top-K, gate and active blocks, and a note of baked patches."""
    config: FluxMoEConfig = patcher.model.moe_config
    settings = settings_of(patcher.model_options.get("transformer_options"))
    active = active_blocks(settings.get("active_blocks"), config.groups)
    config = replace(
        config,
        top_k=settings.get("top_k", config.top_k),
        gate=replace(config.gate, mode=settings.get("gate", config.gate.mode)),
        groups=tuple(replace(group, active=count) for group, count in zip(config.groups, active, strict=True)),
    )
    patches = weight_patches(patcher)
    if not patches:
        return config
    baked = [*config.provenance.get("baked", ()), baking_note(patches)]
    dims = config.dims
    if f"{TRANSFORMER_PREFIX}img_in.weight" in patches and "img_in.comfy_quant" not in specs:
        dims = replace(dims, in_channels=specs["img_in.weight"][1][1])  # some LoRAs (Depth, Canny) raise it
    return replace(
        config,
        dims=dims,
        split_only=False,
        provenance={**config.provenance, "baked": baked},
    )


def saved_metadata(config: FluxMoEConfig, was_split_only: bool) -> dict[str, str]:
    """Return the header's metadata, as for a converted file."""
    metadata = file_metadata(config)
    if was_split_only and not config.split_only:
        start = metadata["modelspec.description"].partition(". ")[0]
        metadata["modelspec.description"] = f"{start}. {_BAKED}"
    return metadata


def next_target(filename_prefix: str) -> Path:
    """Return the next free path in the output folder, counted as ComfyUI does. Raises CheckpointError if there is none."""
    output = folder_paths.get_output_directory()
    longest = max(len(name.encode(errors="replace")) for name in filename_prefix.replace("\\", "/").split("/"))
    if longest > _MAX_NAME or any(unicodedata.category(character) in ("Cc", "Cs") for character in filename_prefix):
        raise CheckpointError(
            f"{_NAME}: filename_prefix is {filename_prefix[:_MAX_NAME]!r}; expected names of up to {_MAX_NAME} bytes "
            "without control characters."
        )
    if os.path.basename(os.path.normpath(filename_prefix)) == ".":  # empty: ComfyUI would make a hidden file
        filename_prefix = _PREFIX
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
    except OSError as error:
        raise CheckpointError(
            f"{_NAME} cannot write to {os.path.join(output, os.path.dirname(filename_prefix))} "
            f"({error.strerror or error}). Make the folder writable, or choose another filename_prefix."
        ) from None
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def save_model(patcher: Any, target: Path, notes: Mapping[str, str]) -> None:
    """Write the FLUX-MoE in `patcher` to `target`, with `notes` in its metadata.

    Raises CheckpointError for controls whose settings no file has, an unwritable folder, a full disk, or patches after
    which it would not be a FLUX-MoE; InterruptProcessingException when the user cancels. Nothing incomplete is left.
    """
    if lost := controls_without_file(patcher):
        raise CheckpointError(
            f"{_NAME} cannot write {', '.join(lost)} to a file, which has one Top-K, gate, capacity and number of active "
            "blocks. Bypass these nodes, or connect the MODEL from before them, and put them after the loader in the "
            "workflow that loads the file."
        )
    patcher.model.check_source_file()
    unload_patches(patcher)
    warn_of_foreign(patcher.model.diffusion_model.state_dict().keys() - own_tensors(patcher).keys(), _NAME)
    specs = file_specs(patcher)
    config = saved_config(patcher, specs)
    stored = config_tensor(config)
    specs[CONFIG_KEY] = (stored.dtype, tuple(stored.shape))
    dtypes = {name: dtype for name, (dtype, _) in specs.items()}
    check_moe({name: shape for name, (_, shape) in specs.items()}, dtypes, config)
    metadata = {**notes, **saved_metadata(config, patcher.model.moe_config.split_only)}
    with TensorWriter(target, specs, metadata) as writer:
        progress, done = comfy.utils.ProgressBar(writer.size), 0
        for name, tensor in file_tensors(patcher):
            comfy.model_management.throw_exception_if_processing_interrupted()
            writer.put(name, stored if name == CONFIG_KEY else tensor)
            done += tensor.nbytes
            progress.update_absolute(done)
        writer.finish(metadata, check_saved)


def check_saved(file: Path) -> None:
    """Raise CheckpointError if what was written is not a FLUX-MoE."""
    try:
        check_file(file)
    except CheckpointError as error:
        raise CheckpointError(
            f"{_NAME} has kept no file of this MODEL, since it could not be loaded again. A patch of another node has "
            f"changed what is no weight. {error}"
        ) from None


class SaveFluxMoE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D2MSaveFluxMoE",
            display_name=_NAME,
            category="FLUX-MoE",
            description=(
                "Saves a FLUX-MoE, the LoRAs that are on it baked into its weights, its Top-K, gate, active blocks and "
                "capacity as the file's own. Loaded again it paints the same images. Schedules, expert masks and replays "
                "are settings of a workflow, not of a file: bypass those nodes to save."
            ),
            search_aliases=["save flux moe", "export model", "bake lora", "merge lora", "checkpoint save", "dense2moe"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A FLUX-MoE, with or without LoRAs; without Schedule, Expert Mask and Replay."
                ),
                io.String.Input(
                    "filename_prefix",
                    default=_PREFIX,
                    tooltip=(
                        "Where in the output folder, and how the name begins; a number follows. What lies in its "
                        "diffusion_models is offered by Load FLUX-MoE."
                    ),
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, filename_prefix: str) -> io.NodeOutput:
        require_flux_moe(model, _NAME)
        require_flux(model, _NAME)
        refuse_injections(model, _NAME)
        target = next_target(filename_prefix)
        save_model(model, target, workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo))
        return io.NodeOutput(ui=ui.PreviewText(os.path.relpath(target, folder_paths.get_output_directory())))


def workflow_metadata(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, str]:
    """Return prompt and workflow as ComfyUI's own nodes write them to a file's metadata."""
    if args.disable_metadata:
        return {}
    notes = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return notes | {name: json.dumps(value) for name, value in (extra_pnginfo or {}).items()}

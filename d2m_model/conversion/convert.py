"""A dense FLUX file becomes a FLUX-MoE file, one tensor at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checkpoint import CONFIG_KEY, check_dense, config_tensor
from ..config import FFNLayout, FluxDims, FluxMoEConfig, Teacher
from ..keys import dense_shapes
from ..layout import ffn_tensors, inverse_order, neuron_axis, permute_neurons
from ..tensor_file import CheckpointError, TensorFile, write
from .split import Dealing, RouterInit, centroid_router, generator_for, neuron_order, random_router

HASH_CHUNK = 8 << 20  # bytes
UNKNOWN_LICENCE = "not stated in the teacher's file"

Progress = Callable[[int], object]  # told the bytes done since it was last called


def open_teacher(path: str | os.PathLike[str]) -> tuple[TensorFile, FluxDims]:
    """A dense FLUX.1 file, checked whole by its header. Raises CheckpointError otherwise."""
    file = TensorFile(path)
    try:
        return file, check_dense(file.shapes, file.dtypes)
    except CheckpointError as error:
        file.close()
        raise CheckpointError(f"{path}: {error}") from None


def describe_teacher(file: TensorFile, progress: Progress = lambda done: None) -> Teacher:
    """Title and licence from the file's header (title else its name), and its sha256, read in chunks."""
    digest = hashlib.sha256()
    with open(file.path, "rb") as stream:
        while chunk := stream.read(HASH_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return Teacher(
        title=file.metadata.get("modelspec.title") or file.path.stem,
        sha256=digest.hexdigest(),
        licence=file.metadata.get("modelspec.license") or UNKNOWN_LICENCE,
    )


def refuse_same_file(teacher: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raises CheckpointError if the output would replace the teacher."""
    if os.path.exists(target) and os.path.samefile(teacher, target):
        raise CheckpointError(f"{target}: this is the teacher; write the FLUX-MoE to another file.")


def split_file(
    teacher: TensorFile,
    target: str | os.PathLike[str],
    config: FluxMoEConfig,
    importance: Mapping[str, Tensor],
    *,
    dealing: Dealing,
    router: RouterInit,
    seed: int,
    progress: Progress = lambda done: None,
) -> None:
    """Write the split-only FLUX-MoE of `teacher` that `config` describes: permuted weights, routers, neuron orders.

    `importance` gives every FFN of `config.ffns` its neurons' importance. Raises CheckpointError if the file cannot be
    written, or would replace the teacher.
    """
    refuse_same_file(teacher.path, target)
    hidden_size, neurons = config.dims.hidden_size, config.dims.neurons
    owner: dict[str, str] = {}  # of a fused tensor: its FFN
    # All of these have their memory first: small ones laid down between large temporaries would fragment the heap.
    extra: dict[str, Tensor] = {CONFIG_KEY: config_tensor(config)}
    for ffn, layout in config.ffns.items():
        extra[f"{ffn}.neuron_order"] = torch.empty(neurons, dtype=torch.int32)
        extra[f"{ffn}.router.weight"] = torch.empty(layout.experts, hidden_size)
    for ffn, layout in config.ffns.items():
        order = extra[f"{ffn}.neuron_order"]
        order.copy_(neuron_order(importance[ffn], layout, dealing, generator_for(seed, f"{ffn} experts")))
        at = ffn_tensors(ffn, hidden_size)
        up = teacher.tensor(f"{at.up}.weight").narrow(0, at.first_row, neurons)
        weight = _router(router, up, order, layout, generator_for(seed, f"{ffn} router"))
        extra[f"{ffn}.router.weight"].copy_(weight)
        owner |= dict.fromkeys((f"{at.up}.weight", f"{at.up}.bias", f"{at.down}.weight"), ffn)

    def produce(name: str) -> Tensor:
        if name in extra:
            return extra[name]
        tensor = teacher.tensor(name)
        progress(tensor.nbytes)
        if name not in owner:
            return tensor
        place = neuron_axis(name, owner[name], hidden_size)
        assert place is not None
        return permute_neurons(tensor, *place, extra[f"{owner[name]}.neuron_order"])

    wanted = dense_shapes(config.dims)
    tensors = {name: (teacher.dtypes[name], shape) for name, shape in teacher.shapes.items() if name in wanted}
    tensors |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()}
    write(target, tensors, produce, metadata_of(config, teacher.metadata))


def metadata_of(config: FluxMoEConfig, teacher: Mapping[str, str] | None = None) -> dict[str, str]:
    """The header's metadata, for people and model managers: the configuration and modelspec fields."""
    architecture = "Flux.1-dev" if config.dims.guidance_embed else "Flux.1-schnell"
    dense = (
        "Its weights are the teacher's with reordered FFN neurons: without the pack it opens and samples as the dense teacher."
        if config.split_only
        else "It needs the pack: opened as a dense FLUX it would run, and give wrong images."
    )
    return {
        CONFIG_KEY: config.to_json(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": f"{config.teacher.title} FLUX-MoE",
        "modelspec.architecture": (teacher or {}).get("modelspec.architecture") or architecture,
        "modelspec.license": config.teacher.licence,
        "modelspec.description": (
            f"FLUX-MoE (schema {config.schema_version}) for ComfyUI-Dense2MoE, converted from {config.teacher.title}. {dense}"
        ),
    }


def _router(init: RouterInit, up_NH: Tensor, order_N: Tensor, layout: FFNLayout, generator: torch.Generator) -> Tensor:
    if init == "random":
        return random_router(layout, up_NH.shape[1], generator)
    return centroid_router(up_NH, order_N, layout)


def dense_weight(tensor: Callable[[str], Tensor], config: FluxMoEConfig, name: str) -> Tensor:
    """A tensor of the dense teacher, out of a split-only FLUX-MoE: its neurons back in their old places, bit for bit."""
    for ffn in config.ffns:
        place = neuron_axis(name, ffn, config.dims.hidden_size)
        if place is not None:
            return permute_neurons(tensor(name), *place, inverse_order(tensor(f"{ffn}.neuron_order")))
    return tensor(name)

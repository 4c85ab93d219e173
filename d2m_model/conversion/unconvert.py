"""Conversion of a FLUX-MoE file back into a dense FLUX file, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from torch import Tensor

from ..blocks import is_modulation
from ..checkpoint import check_file
from ..config import FluxMoEConfig
from ..keys import dense_shapes
from ..layout import inverse_order, neuron_axis
from ..quantised import HEADER_KEY, is_companion
from ..tensor_file import CheckpointError, TensorFile
from ..tensor_writer import TensorWriter
from .convert import ARCHITECTURE, ByteProgress, refuse_same_file
from .permute import permuted_pieces

_ROWS = 1024  # rows of a modulation computed at a time


def unconvert_file(
    path: str | os.PathLike[str], target: str | os.PathLike[str], progress: ByteProgress = lambda done: None
) -> FluxMoEConfig:
    """Write the dense FLUX of a FLUX-MoE file, with BFL keys and the file's dtypes. Return the file's configuration.

    A split-only file gives back the teacher's weights bit for bit. For other files, the neurons return to their original
    order and compressed modulations are multiplied out (lin' U): the result computes what the file does with all experts
    in mode `sum`, without expert means. Block groups lose their routers, so every block runs. `progress` gets the file's
    bytes. Raises CheckpointError for another or a quantised file, and in the cases of TensorWriter.
    """
    config = check_file(path)
    refuse_same_file([path], target, "this is the FLUX-MoE that is read")
    with TensorFile(path) as file:
        wanted = dense_shapes(config.dims)
        companion = next((name for name in file.shapes if is_companion(name, wanted) or name == "scaled_fp8"), None)
        if companion is not None or HEADER_KEY in file.metadata:
            raise CheckpointError(
                f"{path}: this FLUX-MoE is quantised ({companion or HEADER_KEY}); un-convert the file that it was made from."
            )
        tensors = {name: (dtype, wanted[name]) for name, dtype in file.dtypes.items() if name in wanted}
        with TensorWriter(target, tensors, dense_metadata(config, file.metadata.get(ARCHITECTURE))) as writer:
            left = file.size
            for name in tensors:
                writer.put_pieces(name, dense_pieces(file.tensor, config, name))
                file.release(name)
                begin, end = file.span(name)
                progress(end - begin)
                left -= end - begin
            progress(left)
            writer.finish(dense_metadata(config, file.metadata.get(ARCHITECTURE)))
    return config


def dense_pieces(tensor: Callable[[str], Tensor], config: FluxMoEConfig, name: str) -> Iterator[Tensor]:
    """Yield a tensor of the dense FLUX as parts along its first axis, each valid until the next is requested.

    `tensor` returns the FLUX-MoE's tensors by name.
    """
    if config.adaln_rank is not None and is_modulation(name.removesuffix(".weight")):
        basis_AH = tensor("adaln_in.weight").float()
        for rows_OA in tensor(name).split(_ROWS):
            yield (rows_OA.float() @ basis_AH).to(rows_OA.dtype)
        return
    for ffn in config.ffns:
        if name.startswith(ffn) and (axis := neuron_axis(name, ffn, config.dims.hidden_size)) is not None:
            yield from permuted_pieces(tensor(name), *axis, inverse_order(tensor(f"{ffn}.neuron_order")))
            return
    yield tensor(name)


def dense_metadata(config: FluxMoEConfig, architecture: str | None) -> dict[str, str]:
    """Return the header's metadata, for people and model managers."""
    origin = "the teacher's weights, bit for bit" if config.split_only else "not the teacher's weights"
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.teacher.title,
        "modelspec.license": config.teacher.licence,
        "modelspec.description": f"Dense FLUX.1 out of a FLUX-MoE by ComfyUI-Dense2MoE: {origin}.",
    }
    return fields if architecture is None else fields | {ARCHITECTURE: architecture}


def why_not_the_teacher(config: FluxMoEConfig) -> str | None:
    """Return why the dense FLUX is not the teacher, or None if it is."""
    if config.split_only:
        return None
    if "teacher_blocks" in config.provenance:
        return "it has only some of its blocks (depth pruning)"
    if config.adaln_rank is not None:
        return f"its modulations were compressed to rank {config.adaln_rank}"
    return "its weights were changed after the split, by refit or training"

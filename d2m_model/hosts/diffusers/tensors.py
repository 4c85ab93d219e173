"""Loading a FLUX-MoE file's tensors into diffusers' model, and writing them out of it one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn

from ...checkpoint import CONFIG_KEY, config_tensor, expected_tensors, optional_tensors
from ...config import FluxMoEConfig
from ...conversion.convert import file_metadata
from ...keys import dense_shapes
from ...quantised import is_companion, quantised_layers
from ...tensor_file import FLOAT8, CheckpointError, Shape, TensorFile
from ...tensor_writer import TensorWriter
from .tensor_map import tensor_map


class SavableModel(Protocol):
    """A model whose tensors `tensor_map` describes."""

    @property
    def optional(self) -> tuple[str, ...]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


def refuse_quantised(file: TensorFile) -> None:
    """Raises CheckpointError for a file with quantised weights, which only ComfyUI unpacks."""
    layers = [*quantised_layers(file.metadata), *(name for name in file.shapes if is_companion(name, file.shapes))]
    if layers or "scaled_fp8" in file.shapes:
        example = layers[0] if layers else "scaled_fp8"
        raise CheckpointError(
            f"{file.path}: is quantised ({example}), which diffusers does not run here; expected a FLUX-MoE in bfloat16, "
            "float16 or float32, as python -m d2m_train writes it."
        )


@torch.no_grad()
def load_tensors(
    model: nn.Module,
    config: FluxMoEConfig,
    optional: Iterable[str],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    device: str | torch.device,
    quantise: Callable[[str, Tensor], bool] = lambda name, values: False,
) -> None:
    """Copy the file's tensors into parameters and buffers of `model`.

    `dtype` applies to tensors that a dense FLUX.1 has too; None keeps the file's (float8 becomes bfloat16). `quantise`
    puts a parameter, by its name in the model, into it itself and returns True, or returns False.
    """
    dense = dense_shapes(config.dims)
    for name, slices in tensor_map(config, optional).items():
        stored = tensor(name)
        target = stored.dtype if stored.dtype not in FLOAT8 else torch.bfloat16
        if dtype is not None and name in dense:
            target = dtype
        for part in slices:
            values = part.to_model(stored)
            copy = torch.empty(values.shape, dtype=target, device=device).copy_(values)
            if quantise(part.name, copy):
                continue
            owner, _, attribute = part.name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, attribute, copy if attribute in module._buffers else nn.Parameter(copy))


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the `whole` of a model that is not sharded."""
    return tensor


def flux_moe_tensors(
    model: SavableModel,
    config: FluxMoEConfig,
    whole: Callable[[Tensor], Tensor] = whole_tensor,
    only: Container[str] | None = None,
    unchanged: Container[str] = (),
    stored: Callable[[str], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the model's FLUX-MoE file, one at a time, `d2m_config` last. With `only`, those alone.

    whole      returns all of a parameter or buffer, of which this rank may hold a shard; called once for each of them,
               in the same order on every rank
    unchanged  parameters whose values are read from `stored`, a file's tensors by name, since the model may hold them
               in lower precision
    A yielded tensor may share memory with the model: read it, do not write to it.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, slices in tensor_map(config, model.optional).items():
        if only is not None and name not in only:
            continue
        with torch.no_grad():
            parts = []
            for part in slices:
                if stored is not None and part.name in unchanged:
                    parts.append(part.to_file(part.to_model(stored(name))))
                else:
                    parts.append(part.to_file(whole(tensors[part.name]).detach()))
            if len({part.device for part in parts}) > 1:  # frozen parts come from the file, trained ones from a GPU
                parts = [part.cpu() for part in parts]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=slices[0].axis)
        del parts
        yield name, tensor
    if only is None or CONFIG_KEY in only:
        yield CONFIG_KEY, config_tensor(config)


def flux_moe_specs(
    model: SavableModel, config: FluxMoEConfig, dtype: torch.dtype | None = None
) -> dict[str, tuple[torch.dtype, Shape]]:
    """Return dtype and shape of everything that `flux_moe_tensors` yields, in its order.

    `dtype` applies to tensors that a dense FLUX.1 has too; None keeps the model's.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    dense, shapes = dense_shapes(config.dims), expected_tensors(config) | optional_tensors(config)
    specs: dict[str, tuple[torch.dtype, Shape]] = {}
    for name, slices in tensor_map(config, model.optional).items():
        own = reduce(torch.promote_types, (tensors[part.name].dtype for part in slices))
        specs[name] = (dtype if dtype is not None and name in dense else own, shapes[name])
    carried = config_tensor(config)
    return specs | {CONFIG_KEY: (carried.dtype, tuple(carried.shape))}


def save_flux_moe(
    model: SavableModel,
    config: FluxMoEConfig,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    whole: Callable[[Tensor], Tensor] = whole_tensor,
    write: bool = True,
    unchanged: Container[str] = (),
    stored: Callable[[str], Tensor] | None = None,
) -> None:
    """Write the model as a FLUX-MoE v1 file, tensor by tensor and atomically.

    `dtype` as in flux_moe_specs; `whole`, `unchanged` and `stored` as in flux_moe_tensors. Every rank of a sharded model
    calls this, and all but one pass `write` False. Raises CheckpointError if the file cannot be written.
    """
    tensors = flux_moe_tensors(model, config, whole, unchanged=unchanged, stored=stored)
    if not write:
        for _ in tensors:
            pass
        return
    specs = flux_moe_specs(model, config, dtype)
    metadata = file_metadata(config)
    with TensorWriter(path, specs, metadata) as writer:
        for name, tensor in tensors:
            writer.put(name, tensor.to(specs[name][0]))
        writer.finish(metadata)

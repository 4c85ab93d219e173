"""Tensors of a FLUX-MoE file into diffusers' model, and out of it one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...checkpoint import CONFIG_KEY, config_tensor, expected_tensors, optional_tensors
from ...config import FluxMoEConfig
from ...conversion.convert import metadata_of
from ...keys import dense_shapes
from ...quantised import is_companion, layers_of
from ...tensor_file import CheckpointError, Shape, TensorFile
from ...tensor_writer import TensorWriter
from .places import places

if TYPE_CHECKING:
    from .transformer import FluxMoETransformer2DModel

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def refuse_quantised(file: TensorFile) -> None:
    """Raises CheckpointError for a file with quantised weights, which ComfyUI alone unpacks."""
    layers = [*layers_of(file.metadata), *(name for name in file.shapes if is_companion(name, file.shapes))]
    if layers or "scaled_fp8" in file.shapes:
        what = layers[0] if layers else "scaled_fp8"
        raise CheckpointError(
            f"{file.path}: is quantised ({what}), which diffusers does not run here; expected a FLUX-MoE in bfloat16, "
            "float16 or float32, as python -m d2m_train writes it."
        )


@torch.no_grad()
def fill(
    model: FluxMoETransformer2DModel,
    config: FluxMoEConfig,
    optional: Iterable[str],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    device: str | torch.device,
    only: Container[str] | None = None,
) -> None:
    """Every parameter and buffer, copied from the file's tensors; of `only` these, where it is given."""
    dense = dense_shapes(config.dims)
    for name, parts in places(config, optional).items():
        if only is not None and name not in only:
            continue
        stored = tensor(name)
        target = stored.dtype if stored.dtype not in FLOAT8 else torch.bfloat16
        if dtype is not None and name in dense:
            target = dtype
        for place in parts:
            part = place.take(stored)
            value = torch.empty(part.shape, dtype=target, device=device).copy_(part)
            owner, _, attribute = place.name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, attribute, value if attribute in module._buffers else nn.Parameter(value))


def as_it_is(tensor: Tensor) -> Tensor:
    """`whole` of a model that is in one piece."""
    return tensor


def flux_moe_tensors(
    model: FluxMoETransformer2DModel,
    config: FluxMoEConfig,
    whole: Callable[[Tensor], Tensor] = as_it_is,
    only: Container[str] | None = None,
    unchanged: Container[str] = (),
    stored: Callable[[str], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model's FLUX-MoE file, one at a time, `d2m_config` last; of `only` these, where it is given.

    `whole` turns a parameter or buffer, of which this rank may hold a part, into all of it; it is called for each of them
    once, in the same order on every rank. What is yielded may be the model's own: to be read, not written.
    Of the parameters in `unchanged` the values are those of `stored`, a file's tensors by name: the model may hold them in
    less precision.
    """
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, parts in places(config, model.optional).items():
        if only is not None and name not in only:
            continue
        with torch.no_grad():
            found = []
            for place in parts:
                if stored is not None and place.name in unchanged:
                    found.append(place.give(place.take(stored(name))))
                else:
                    found.append(place.give(whole(held[place.name]).detach()))
            tensor = found[0] if len(found) == 1 else torch.cat(found, dim=parts[0].axis)
        del found
        yield name, tensor
    if only is None or CONFIG_KEY in only:
        yield CONFIG_KEY, config_tensor(config)


def flux_moe_specs(
    model: FluxMoETransformer2DModel, config: FluxMoEConfig, dtype: torch.dtype | None = None
) -> dict[str, tuple[torch.dtype, Shape]]:
    """dtype and shape of what flux_moe_tensors yields, in its order. `dtype`, if given, of what a dense FLUX.1 has too."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    dense, shapes = dense_shapes(config.dims), expected_tensors(config) | optional_tensors(config)
    specs: dict[str, tuple[torch.dtype, Shape]] = {}
    for name, parts in places(config, model.optional).items():
        own = reduce(torch.promote_types, (held[place.name].dtype for place in parts))
        specs[name] = (dtype if dtype is not None and name in dense else own, shapes[name])
    carried = config_tensor(config)
    return specs | {CONFIG_KEY: (carried.dtype, tuple(carried.shape))}


def save_flux_moe(
    model: FluxMoETransformer2DModel,
    config: FluxMoEConfig,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    whole: Callable[[Tensor], Tensor] = as_it_is,
    write: bool = True,
    unchanged: Container[str] = (),
    stored: Callable[[str], Tensor] | None = None,
) -> None:
    """The model as a FLUX-MoE v1 file, tensor by tensor and atomically.

    `dtype`: of what a dense FLUX.1 has too; None keeps the model's. Of several ranks all call it, with `whole`, and all
    but one pass `write` False. `unchanged` and `stored` as in flux_moe_tensors. Raises CheckpointError if the file cannot
    be written.
    """
    tensors = flux_moe_tensors(model, config, whole, unchanged=unchanged, stored=stored)
    if not write:
        for _ in tensors:
            pass
        return
    specs = flux_moe_specs(model, config, dtype)
    metadata = metadata_of(config)
    with TensorWriter(path, specs, metadata) as writer:
        for name, tensor in tensors:
            writer.put(name, tensor.to(specs[name][0]))
        writer.finish(metadata)


def state_dict_of_flux_moe(model: FluxMoETransformer2DModel, config: FluxMoEConfig) -> dict[str, Tensor]:
    """Every tensor of the model's FLUX-MoE file, `d2m_config` among them."""
    return dict(flux_moe_tensors(model, config))

"""The dense FLUX.1 in a MODEL, as a conversion reads it.

It is read from the file that it was loaded from if the two are equal, else from memory, tensor by tensor, with its
patches (LoRAs) applied to the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_base
import comfy.utils
import torch
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...d2m_model.checkpoint import CheckpointError, check_dense, dims_of
from ...d2m_model.config import Teacher
from ...d2m_model.conversion.convert import UNHASHED, UNKNOWN_LICENCE, describe_teacher
from ...d2m_model.keys import bfl_spelling, dense_shapes
from ...d2m_model.teacher import DenseTeacher, dequantise_float8, open_teacher
from ...d2m_model.tensor_file import FLOAT8, Shape, bytes_of, is_finite
from ..model.flux_moe import TRANSFORMER_PREFIX, FluxMoEModel, require_link
from ..model.unloading import patched_weight, unload_patches
from .injections import refuse_injections, require_flux, warn_of_foreign
from .save_node import weight_patches

_VARIANTS = ("txt_norm.",)  # modules of ComfyUI's Flux that FLUX.1 does not have
_FLOAT8_LAYOUTS = "TensorCoreFP8"  # prefix of ComfyUI's names for float8 layouts with a scale


def refuse_others(model: Any, node: str) -> None:
    """Raise ValueError unless this MODEL has a dense FLUX.1, with all changes in weights whose neurons can be reordered."""
    require_link(model, ModelPatcher, node, "model")
    base = model.model
    if isinstance(base, FluxMoEModel):
        raise ValueError(f"{node}: this MODEL is a FLUX-MoE already. Connect a dense FLUX.")
    if type(base) is not comfy.model_base.Flux and not isinstance(base.diffusion_model, Flux):
        raise ValueError(
            f"{node} works on a dense FLUX.1 (dev, schnell, Fill, Kontext …), but this MODEL is a {type(base).__name__}."
        )
    require_flux(model, node)
    refuse_injections(model, node)
    own = set(own_parameters(model).values())
    warn_of_foreign({name for name, _ in base.diffusion_model.named_parameters()} - own, node)
    for name, module in base.diffusion_model.named_modules():
        weight, quantisation = getattr(module, "weight", None), None
        if f"{name}.weight" not in own:
            continue
        weight = as_plain(weight)
        if isinstance(weight, QuantizedTensor) and not str(weight._layout_cls).startswith(_FLOAT8_LAYOUTS):
            quantisation = str(weight._layout_cls)
        elif isinstance(weight, Tensor) and not weight.dtype.is_floating_point:
            quantisation = f"{type(module.weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
        elif getattr(module, "pre_quant_scale", None) is not None:
            quantisation = "smoothed (pre_quant_scale)"
        if quantisation is not None:
            raise ValueError(
                f"{node}: this FLUX is quantised ({quantisation}, {name}.weight), and its neurons cannot be reordered "
                "without loss. Load its bfloat16, float16 or float8 version."
            )
    LoadedTeacher(model)


@contextmanager
def open_dense(model: Any) -> Iterator[tuple[DenseTeacher | LoadedTeacher, Teacher]]:
    """Open the teacher to convert, and its description."""
    unload_patches(model)  # a clone's LoRA may be applied to the weights that it shares with this MODEL
    with _opened(_file_of(model)) as file:
        about = Teacher(title=type(model.model).__name__, sha256=UNHASHED, licence=UNKNOWN_LICENCE)
        if file is not None:
            about = describe_teacher(file)
        if file is not None and not weight_patches(model) and _same(file, model):
            yield file, about
        else:
            yield LoadedTeacher(model), about


def _file_of(model: Any) -> Path | None:
    """Return the file that ComfyUI's loader noted, if it exists."""
    _, arguments, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    path = arguments[0] if arguments else None
    return Path(path) if isinstance(path, str) and Path(path).is_file() else None


@contextmanager
def _opened(path: Path | None) -> Iterator[DenseTeacher | None]:
    teacher = None
    if path is not None:
        try:
            teacher = open_teacher(path)
        except CheckpointError:  # for example a .ckpt
            teacher = None
    if teacher is None:
        yield None
    else:
        with teacher:
            yield teacher


def _same(file: DenseTeacher, model: Any) -> bool:
    """Return whether the file still has the weights in memory, judged by a row of every tensor."""
    loaded = _parameters(model)
    if {name: tuple(tensor.shape) for name, tensor in loaded.items()} != dict(file.shapes):
        return False
    for name, tensor in loaded.items():
        if isinstance(tensor, QuantizedTensor):
            continue
        row = file.tensor(name)[:1].to(tensor.dtype)
        file.release(name)
        if not torch.equal(row.float(), tensor[:1].detach().cpu().float()):
            return False
    return True


def own_parameters(model: Any) -> dict[str, str]:
    """Return the names of the transformer's parameters by BFL name, without those that other packs have added.

    Parameters of FLUX.1's variants are among them, for `check_dense` to refuse.
    """
    flux = model.model.diffusion_model
    names = {bfl_spelling(name): name for name, _ in flux.named_parameters()}
    try:
        known = dense_shapes(dims_of({name: tuple(flux.get_parameter(own).shape) for name, own in names.items()}))
    except CheckpointError:
        return names
    return {name: own for name, own in names.items() if name in known or name.startswith(_VARIANTS)}


def _parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters by BFL name."""
    flux = model.model.diffusion_model
    return {name: as_plain(flux.get_parameter(own)) for name, own in own_parameters(model).items()}


def as_plain(weight: Any) -> Any:
    """Return a weight of a GGUF file that is not quantised as a plain tensor, in the same memory; others as they are.

    The loader of such files has tensors of a type of its own, which are bytes where the file has bfloat16.
    """
    kind = getattr(getattr(weight, "tensor_type", None), "name", None)
    if kind not in ("F32", "F16", "BF16"):
        return weight
    data: Tensor = weight.data.as_subclass(Tensor)
    return data.view(torch.bfloat16).view(tuple(weight.tensor_shape)) if kind == "BF16" else data


class LoadedTeacher:
    """A teacher in memory (see d2m_model.conversion.interfaces.TeacherTensors).

    float8 is returned as bfloat16, other types as the MODEL has them: on a CPU float32, where the file has bfloat16. The
    MODEL has to be unloaded (model/unloading.py) before `tensor` is called. Raises CheckpointError if it is not a
    dense FLUX.1.
    """

    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = {}

    def __init__(self, model: Any) -> None:
        self._patcher = model
        self._names = own_parameters(model)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self.size = 0
        for name, tensor in _parameters(model).items():
            key, shape = self._key(name), tuple(tensor.shape)
            if key in model.patches and not isinstance(tensor, QuantizedTensor):
                shape = tuple(comfy.lora.calculate_shape(model.patches[key], tensor, key))
            coarse = isinstance(tensor, QuantizedTensor) or tensor.dtype in FLOAT8
            self.shapes[name], self.dtypes[name] = shape, torch.bfloat16 if coarse else tensor.dtype
            begin, self.size = self.size, self.size + bytes_of(self.dtypes[name], shape)
            self._spans[name] = begin, self.size
        try:
            self.dims = check_dense(self.shapes, self.dtypes)
            if surplus := sorted(set(self.shapes) - set(dense_shapes(self.dims))):
                raise CheckpointError(f"This is not FLUX.1 but a variant of it, with {surplus[0]}.")
        except CheckpointError as error:
            raise CheckpointError(f"This MODEL cannot be converted. {error}") from None

    def _key(self, name: str) -> str:
        return f"{TRANSFORMER_PREFIX}{self._names[name]}"

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as ComfyUI would use it for sampling, on the CPU."""
        key = self._key(name)
        weight = comfy.utils.get_attr(self._patcher.model, key)
        if (plain := as_plain(weight)) is not weight:
            weight = plain
            if key in self._patcher.patches:
                patches, seed = self._patcher.patches[key], comfy.utils.string_to_seed(key)
                patched = comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), key)
                weight = comfy.float.stochastic_rounding(patched, weight.dtype, seed=seed)
        elif key in self._patcher.patches:
            weight = patched_weight(self._patcher, key)
        if isinstance(weight, QuantizedTensor):
            scale = weight.params.scale.detach().float().cpu().reshape(-1, 1)
            return dequantise_float8(weight._qdata.detach().cpu(), scale)
        found: Tensor = weight.detach().cpu()
        if not is_finite(found):
            raise CheckpointError(
                f"{name} of this MODEL has NaN or infinite values, from its file or a LoRA on it: it makes no images. "
                "Load another file, or leave out the LoRA."
            )
        return dequantise_float8(found, None) if found.dtype in FLOAT8 else found

    def span(self, name: str) -> tuple[int, int]:
        return self._spans[name]

    def release(self, name: str) -> None:
        """Does nothing: no pages of a file are in memory."""

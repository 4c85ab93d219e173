"""Stand-ins for other node packs: the ways in which they patch a FLUX, each as a function from a MODEL to a MODEL.

ComfyUI has to be imported before this module (fixture `host`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock, timestep_embedding
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn


def own_loop(
    flux: Any, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
    guidance: Tensor | None = None, control: Any = None, transformer_options: Any = {}, attn_mask: Any = None,  # noqa: B006
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """A forward_orig from before blocks had transformer_options."""
    img, txt = flux.img_in(img), flux.txt_in(txt)
    vec = flux.time_in(timestep_embedding(timesteps, 256).to(img.dtype)) + flux.vector_in(y)
    if flux.params.guidance_embed:
        vec = vec + flux.guidance_in(timestep_embedding(guidance, 256).to(img.dtype))
    pe = flux.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
    for block in flux.double_blocks:
        img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask)
    joint = torch.cat((txt, img), 1)
    for block in flux.single_blocks:
        joint = block(joint, vec=vec, pe=pe, attn_mask=attn_mask)
    found: Tensor = flux.final_layer(joint[:, txt.shape[1] :], vec)
    return found


def loop_replaced_while_called(model: Any) -> Any:
    """As feature caches do: a unet function wrapper exchanges forward_orig for the time of each call."""
    clone, flux = model.clone(), model.model.diffusion_model

    def wrapper(apply: Any, args: dict[str, Any]) -> Tensor:
        with mock.patch.object(flux, "forward_orig", types.MethodType(own_loop, flux)):
            found: Tensor = apply(args["input"], args["timestep"], **args["c"])
        return found

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def loop_of_an_object_patch(model: Any) -> Any:
    """As face adapters do, with ComfyUI's means."""
    clone = model.clone()
    clone.add_object_patch("diffusion_model.forward_orig", types.MethodType(own_loop, model.model.diffusion_model))
    return clone


class ForeignSingle(SingleStreamBlock):
    """A single block with a dense FFN, whatever it was before."""


def foreign_forward(block: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A forward in place of a single block's own."""
    found: Tensor = SingleStreamBlock.forward(block, *args, **kwargs)
    return found


class ForeignDouble(DoubleStreamBlock):
    """A double block that calls its FFNs as modules."""


@contextmanager
def exchanged_class(block: nn.Module, foreign: type[nn.Module]) -> Iterator[None]:
    own = block.__class__
    block.__class__ = foreign
    try:
        yield
    finally:
        block.__class__ = own


class Wrapped(nn.Module):
    """A module in place of the transformer, as some packs put it there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "params"):
            return getattr(self.inner, name)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@contextmanager
def replaced_transformer(model: Any, wrapper: Any) -> Iterator[None]:
    """The transformer of a MODEL, replaced in place."""
    base, own = model.model, model.model.diffusion_model
    base.diffusion_model = wrapper(own)
    try:
        yield
    finally:
        base.diffusion_model = own


@contextmanager
def added_modules(model: Any) -> Iterator[None]:
    """Modules that adapters put on the transformer and on a block."""
    flux = model.model.diffusion_model
    flux.face_layers, flux.single_blocks[0].adapter = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4)
    try:
        yield
    finally:
        del flux.face_layers, flux.single_blocks[0].adapter


class GGUFTensor(Tensor):
    """A weight as the loader of GGUF files has it: bytes, unless its type is one of torch's that it knows."""

    def __new__(cls, data: Tensor, kind: str, shape: Any) -> GGUFTensor:
        found = data.as_subclass(cls)
        found.tensor_type, found.tensor_shape = types.SimpleNamespace(name=kind), shape
        return found

    def detach(self) -> GGUFTensor:
        return self

    @property
    def shape(self) -> Any:
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()


class GGUFPatcher(ModelPatcher):
    """Its loader's patcher: it patches while a weight is dequantised, and cannot return a patched weight."""

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> None:
        raise AssertionError("only while sampling")


def as_gguf(model: Any, kind: str) -> Any:
    """Turn the weights of the blocks of a dense FLUX into those that the loader of GGUF files makes, and its patcher."""
    for module in model.model.diffusion_model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[kind]
            data = weight.detach().to(dtype)
            data = data.view(torch.uint8) if kind == "BF16" else data
            module.weight = nn.Parameter(GGUFTensor(data, kind, weight.shape), requires_grad=False)
    clone = model.clone()
    clone.__class__, clone.cached_patcher_init = GGUFPatcher, None
    return clone


def context_windows(model: Any, dim: int, length: int, overlap: int) -> Any:
    """ComfyUI's Context Windows, over the batch (dim 0) or the height (dim 2)."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(
        model, context_length=length, context_overlap=overlap, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=dim, freenoise=False,
    ).result[0]  # fmt: skip

"""Activations that autograd keeps of a training step, counted by running the step's own code on tensors without values.

So the count includes all that it depends on: trained weights, gradient checkpointing, mixed precision, the experts'
gathered rows, the kind of attention. CPU kernels stand in for a GPU's; they keep the same tensors except for a few small
ones.

Shapes: B batch, T image and L text tokens, C channels of a token, H hidden size.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from d2m_model.blocks import DIFFUSERS_BLOCKS, blocks_of
from d2m_model.checkpoint import expected_tensors, optional_tensors
from d2m_model.config import FluxDims, FluxMoEConfig
from d2m_model.cost import Tokens

from ..data.batch import Batch
from ..distillation.features import stream_names
from ..distillation.stages import StagePlan, prepare_student
from ..distillation.step import Distillation
from ..flow.noise import NoisyBatch
from ..run_config import RunConfig

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

_OUTSIDE = ""  # the block name of tensors outside of blocks
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True, slots=True, frozen=True)
class Activations:
    """Bytes that autograd keeps for the backward pass, by BFL block name; the empty string is for the rest (losses)."""

    by_block: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_block.values())

    @property
    def largest_block(self) -> int:
        return max((size for name, size in self.by_block.items() if name != _OUTSIDE), default=0)


@contextmanager
def without_values() -> Iterator[None]:
    """Make tensors of the `with` without values: they have shapes and dtypes only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def saved_activations(
    run: RunConfig, plan: StagePlan, core: FluxMoETransformer2DModel, teacher: FluxDims, tokens: Tokens
) -> Activations:
    """Count one microbatch of a stage, forward pass and losses: bytes of unique storages, without weights.

    `core` is a `valueless_student` made in the same `without_values`. No text token is padding.
    """
    size = run.training.batch_size
    distillation = Distillation(
        teacher=cast("FluxTransformer2DModel", _Teacher(teacher, getattr(torch, run.teacher.dtype))),
        student=_Autocast(core, _AUTOCAST.get(run.training.mixed_precision)),
        core=core,
        plan=plan,
        run=run,
    )
    batch = _batch(teacher, tokens, size)
    assert batch.tokens_BTC is not None
    noisy = NoisyBatch(tokens_BTC=batch.tokens_BTC, t_B=torch.empty(size), target_BTC=batch.tokens_BTC)
    core.train()
    with _saved(core) as counted:
        distillation.compare(batch, noisy)
    return counted[0]


def optional_names(run: RunConfig, config: FluxMoEConfig) -> list[str]:
    """Names of the optional tensors that this run's conversion writes."""
    kinds = ((".router.bias", run.convert.router == "ridge"), (".expert_mean", run.convert.mean))
    if run.student.baseline == "mlp_pruning":
        return []
    return [name for name in optional_tensors(config) if any(name.endswith(end) for end, wanted in kinds if wanted)]


def valueless_student(run: RunConfig, plan: StagePlan, config: FluxMoEConfig) -> FluxMoETransformer2DModel:
    """Build the student as a stage trains it, in `without_values`: dtypes, frozen weights, gates, checkpointing."""
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
    from d2m_model.hosts.diffusers.tensors import load_tensors

    optional = optional_names(run, config)
    shapes = expected_tensors(config) | optional_tensors(config)

    def empty(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=torch.int32 if name.endswith(".neuron_order") else torch.float32)

    with torch.device("meta"):
        core = FluxMoETransformer2DModel(config, optional)
    load_tensors(core, config, optional, empty, getattr(torch, run.student.dtype), "cpu")
    prepare_student(core, plan, run.student.frozen_dtype)
    for moe in core.moe_ffns().values():
        # One chunk: in an uneven routing, where chunks begin depends on values.
        moe.chunk_tokens = sys.maxsize
    if run.training.gradient_checkpointing:
        core.enable_gradient_checkpointing()
    return core


class _Teacher(nn.Module):
    """A stand-in for the teacher: the model and its blocks give outputs of the right shapes."""

    def __init__(self, dims: FluxDims, dtype: torch.dtype) -> None:
        super().__init__()
        self.dims, self.config = dims, SimpleNamespace(guidance_embeds=dims.guidance_embed)
        self.dtype = nn.Parameter(torch.empty(1, dtype=dtype), requires_grad=False)
        for kind, depth in dims.depths.items():
            self.add_module(DIFFUSERS_BLOCKS[kind], nn.ModuleList(_TeacherBlock() for _ in range(depth)))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        for block in blocks_of(self).values():
            block(*(x.new_empty(*x.shape[:2], self.dims.hidden_size) for x in (encoder_hidden_states, hidden_states)))
        return (hidden_states.new_empty(*hidden_states.shape[:2], self.dims.out_channels),)


class _TeacherBlock(nn.Module):
    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return text, image


def _batch(dims: FluxDims, tokens: Tokens, size: int) -> Batch:
    return Batch(
        tokens_BTC=torch.empty(size, tokens.image, dims.out_channels),
        context_BLD=torch.empty(size, tokens.text, dims.context_size),
        pooled_BV=torch.empty(size, dims.vector_size),
        guidance_B=torch.empty(size),
        image_ids_T3=torch.empty(tokens.image, 3),
        text_ids_L3=torch.empty(tokens.text, 3),
        words_BL=torch.ones(size, tokens.text, dtype=torch.bool),
    )


class _Autocast:
    """A model under mixed precision as accelerate runs it: outputs are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, dtype
        self.parameters = model.parameters

    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        if self._dtype is None:
            outputs: tuple[Tensor, ...] = self._model(**inputs)
            return outputs
        with torch.autocast("cpu", self._dtype):
            outputs = self._model(**inputs)
        return tuple(tensor.float() for tensor in outputs)


@contextmanager
def _saved(model: FluxMoETransformer2DModel) -> Iterator[list[Activations]]:
    """Count what autograd keeps of forward passes during the `with`; the list has one entry after it."""
    weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    block = [_OUTSIDE]
    kept: dict[int, tuple[str, Tensor]] = {}  # keeps the tensor alive, so that no other gets its storage's address

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept.setdefault(_storage(tensor), (block[0], tensor))
        return tensor

    def enter(name: str) -> Any:
        return lambda *_: block.__setitem__(0, name)

    handles = []
    for one, module in blocks_of(model).items():
        handles.append(module.register_forward_pre_hook(enter(one.name)))
        handles.append(module.register_forward_hook(enter(_OUTSIDE)))
    counted: list[Activations] = []
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield counted
    finally:
        for handle in handles:
            handle.remove()
    by_block: dict[str, int] = {}
    for name, tensor in kept.values():
        by_block[name] = by_block.get(name, 0) + tensor.untyped_storage().nbytes()
    counted.append(Activations(by_block=by_block))


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def feature_bytes(run: RunConfig, plan: StagePlan, dims: FluxDims, tokens: Tokens) -> int:
    """Bytes of the block outputs that a step keeps until its losses are computed, beyond those that autograd keeps.

    These are all of the teacher's, and those of the student's single blocks, whose two streams are concatenated.
    """
    student = _AUTOCAST.get(run.training.mixed_precision, getattr(torch, run.student.dtype))
    elements = run.training.batch_size * tokens.joint * dims.hidden_size
    singles = sum(len(stream_names(feature.student)) == 1 for feature in plan.features)
    teacher: torch.dtype = getattr(torch, run.teacher.dtype)
    return elements * (len(plan.features) * teacher.itemsize + singles * student.itemsize)

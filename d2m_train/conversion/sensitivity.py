"""Measurement of a FLUX-MoE's sensitivity against its teacher: see d2m_model/sensitivity.py.

The teacher runs on noised samples. An FFN that runs with k experts instead of the dense one changes its output by
d = y_k - y, and the model's velocity, to first order, by J d, where J is the Jacobian of the velocity in that output. For
a vector u of independent random signs, E (u^T J d)^2 = |J d|^2, and u^T J is one backward pass, which serves every FFN,
every k and every block. So a table costs a few forward and backward passes, and not one pass for each of its entries.

Shapes: B batch, P probes, T tokens, H hidden size, C channels of a token, M blocks of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m_model.blocks import blocks_of
from d2m_model.conversion.split import generator_for
from d2m_model.hosts.diffusers import ffn_linears
from d2m_model.mob import mean_tokens
from d2m_model.moe import MoEFFN
from d2m_model.sensitivity import Errors, Sensitivity

from .. import UserError
from ..data.batch import Batch, DataSource, check_fits
from ..data.emoji import EMOJI_SHIFT, EmojiData
from ..flow.noise import channels_of, shifted, time_shift
from ..flow.velocity import noised, velocity
from ..run_config import TimestepsSection
from .calibrate import with_images

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel


@dataclass(kw_only=True, slots=True, frozen=True)
class SensitivitySettings:
    """Size of the measurement.

    bins      noise levels, each with an equal share of the steps of a schedule with time shift `mu`
    batches, batch_size   samples per bin
    probes    random vectors per batch
    """

    mu: float
    seed: int
    bins: int = 3
    batches: int = 4
    batch_size: int = 8
    probes: int = 4

    @property
    def levels(self) -> tuple[float, ...]:
        """Return the falling edges of the bins."""
        return tuple(shifted(torch.linspace(1, 0, self.bins + 1), self.mu).tolist())


def schedule_shift(data: DataSource) -> float:
    """Return the time shift of the schedule that the data's pictures are sampled with: the demo's, or FLUX's by size."""
    if isinstance(data, EmojiData):
        return EMOJI_SHIFT
    return time_shift(len(data.batch(0, 1, 0).image_ids_T3), TimestepsSection())


def measure_sensitivity(
    teacher: FluxTransformer2DModel,
    student: FluxMoETransformer2DModel,
    data: DataSource,
    settings: SensitivitySettings,
    progress: Callable[[], object] = lambda: None,
) -> Sensitivity:
    """Return the table of `student`. Both models are in eval mode and frozen; `progress` is called after each batch.

    The student's FFNs come to the teacher's device one at a time. Raises UserError for data that do not fit the teacher,
    and for a student of other routers than top-k or with other blocks than the teacher's.
    """
    config = student.flux_moe
    if config.router.setting != "top_k":
        raise UserError(
            f"This file has {config.router.named}, whose experts are no budget's to give: nothing to measure."
        )
    if "teacher_outputs" in config.provenance or len(blocks_of(student)) != len(blocks_of(teacher)):
        raise UserError("This file has other blocks than its teacher, so their errors cannot be compared.")
    meter = _Meter(teacher, student, settings)
    batch: Batch | None = None
    for bin_, number in itertools.product(range(settings.bins), range(settings.batches)):
        batch = data.batch(number, settings.batch_size, settings.seed)
        check_fits(batch, config.dims)
        meter.measure(bin_, number, batch)
        progress()
    assert batch is not None
    return Sensitivity(
        levels=settings.levels,
        image_tokens=len(batch.image_ids_T3),
        text_tokens=len(batch.text_ids_L3),
        samples=settings.batches * settings.batch_size,
        data=data.name,
        ffns={name: meter.errors(name) for name in config.ffns},
        groups=tuple(meter.errors(f"group {index}") for index in range(len(config.groups))),
    )


@dataclass(slots=True)
class _Seen:
    """Tensors that hooks see in the forward pass: an FFN's input and output, or the streams around a block."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    vec: Tensor | None = None


class _Meter:
    """Sums of squared changes of the velocity, by FFN or group: [bins, k + 1]."""

    def __init__(
        self, teacher: FluxTransformer2DModel, student: FluxMoETransformer2DModel, settings: SensitivitySettings
    ) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings
        self.moes = student.moe_ffns()
        self.linears = {name: (up, down, first) for name, up, down, first in ffn_linears(teacher) if name in self.moes}
        self.sums: dict[str, Tensor] = {}
        self.elements = 1

    def errors(self, name: str) -> Errors:
        count = self.settings.batches * self.settings.batch_size * self.settings.probes * self.elements
        return tuple(tuple(row) for row in (self.sums[name] / count).tolist())

    def measure(self, bin_: int, number: int, batch: Batch) -> None:
        """Add one batch at noise levels of one bin."""
        settings, count = self.settings, len(batch.pooled_BV)
        generator = generator_for(settings.seed, f"sensitivity {number}")  # the same noise and probes in every bin
        batch = with_images(self.teacher, batch, generator)
        images_BTC = batch.images()
        noise_BTC = torch.randn(*images_BTC.shape[:2], channels_of(self.teacher), generator=generator)
        place_B = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        t_B = shifted(1 - (bin_ + place_B) / settings.bins, settings.mu)
        noisy_BTC = noised(images_BTC, noise_BTC, t_B).requires_grad_()
        seen: dict[str, _Seen] = {}
        with torch.enable_grad(), self._hooked(seen):
            flow_BTC = velocity(
                self.teacher, batch, noisy_BTC, t_B, batch.guidance_B, bool(self.teacher.config.guidance_embeds)
            )
        self.elements = flow_BTC[0].numel()
        outputs = [tensor for it in seen.values() for tensor in it.outputs]
        gradients: list[tuple[Tensor, ...]] = []
        for _ in range(settings.probes):
            sign_BTC = (torch.randint(2, flow_BTC.shape, generator=generator) * 2 - 1).to(flow_BTC)
            gradients.append(
                torch.autograd.grad(flow_BTC, outputs, sign_BTC, retain_graph=True, materialize_grads=True)
            )
        with torch.no_grad():
            self._add(bin_, seen, outputs, gradients)

    @contextmanager
    def _hooked(self, seen: dict[str, _Seen]) -> Iterator[None]:
        """Fill `seen` by FFN and, for blocks of groups, by block."""
        grouped = {block.name for group in self.student.flux_moe.groups for block in group.members}
        with ExitStack() as stack:
            for name, (up, down, _) in self.linears.items():
                stack.callback(up.register_forward_pre_hook(_input_hook(seen, name)).remove)
                stack.callback(down.register_forward_hook(_output_hook(seen, name)).remove)
            for block, module in blocks_of(self.teacher).items():
                if block.name in grouped:
                    hook = _block_hook(seen, f"block {block.name}")
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _add(
        self, bin_: int, seen: dict[str, _Seen], outputs: list[Tensor], gradients: list[tuple[Tensor, ...]]
    ) -> None:
        of_output = dict(zip(map(id, outputs), zip(*gradients, strict=True), strict=True))  # P gradients by output
        for name, moe in self.moes.items():
            (x_BTH,), (output_BTH,) = seen[name].inputs, seen[name].outputs
            gradient_PBTH = torch.stack(of_output[id(output_BTH)]).float()
            up, down, column = self.linears[name]
            hidden_BTN = F.gelu(up(x_BTH), approximate="tanh")
            dense_BTH = F.linear(hidden_BTN, down.weight[:, column:], down.bias)
            for k, routed_BTH in enumerate(_at_each_k(moe, x_BTH)):
                change_PB = torch.einsum("pbth,bth->pb", gradient_PBTH, (routed_BTH - dense_BTH).float())
                self._sum(name, moe.layout.experts, bin_)[k] += change_PB.double().square().sum().cpu()
        for index, group in enumerate(self.student.flux_moe.groups):
            members = [seen[f"block {block.name}"] for block in group.members]
            change_PBM = torch.stack([_skipping(member, of_output) for member in members], dim=2)
            for active in range(group.blocks + 1):
                skipped_BM = ~self._chosen(index, members[0], active).to(change_PBM.device)
                change_PB = (change_PBM * skipped_BM).sum(2)
                self._sum(f"group {index}", group.blocks, bin_)[active] += change_PB.double().square().sum().cpu()

    def _sum(self, name: str, most: int, bin_: int) -> Tensor:
        """Return the sums of one bin, which are added to in place."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(self.settings.bins, most + 1, dtype=torch.float64)
        return self.sums[name][bin_]

    def _chosen(self, index: int, first: _Seen, active: int) -> Tensor:
        """Return the blocks of a group that run, bool [B, M]."""
        router = self.student.block_routers()[index]
        own, router.active = router.active, active
        try:
            assert first.vec is not None
            device = router.router_x.weight.device
            chosen_BM: Tensor = router(mean_tokens(*first.inputs).to(device), first.vec.to(device)).chosen_BM
        finally:
            router.active = own
        return chosen_BM


def _at_each_k(moe: MoEFFN, x_BTH: Tensor) -> Iterator[Tensor]:
    """Yield the FFN's output with 0 to all experts per token, on the device of x."""
    own, home = moe.router_value, moe.routed_up.device
    try:
        moe.to(x_BTH.device)
        for k in range(moe.layout.experts + 1):
            moe.router_value = k
            yield moe(x_BTH.to(moe.routed_up.dtype))
    finally:
        moe.router_value = own
        moe.to(home)


def _skipping(block: _Seen, of_output: dict[int, tuple[Tensor, ...]]) -> Tensor:
    """Return the change of the probed velocities if a block is skipped, [P, B]."""
    changes = []
    for before_BTH, after_BTH in zip(block.inputs, block.outputs, strict=True):
        gradient_PBTH = torch.stack(of_output[id(after_BTH)]).float()
        changes.append(torch.einsum("pbth,bth->pb", gradient_PBTH, (before_BTH - after_BTH).float()))
    return torch.stack(changes).sum(0)


def _input_hook(seen: dict[str, _Seen], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Tensor]) -> None:
        seen[name] = _Seen(inputs=(arguments[0].detach(),), outputs=())

    return hook


def _output_hook(seen: dict[str, _Seen], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: Any, output: Tensor) -> None:
        seen[name].outputs = (output,)

    return hook


def _block_hook(seen: dict[str, _Seen], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: Any, keywords: dict[str, Any], outputs: tuple[Tensor, Tensor]) -> None:
        names = ("hidden_states", "encoder_hidden_states", "temb")
        given = dict(zip(names, arguments, strict=False)) | keywords
        # diffusers' blocks return text before image.
        inputs = (given["encoder_hidden_states"].detach(), given["hidden_states"].detach())
        seen[name] = _Seen(inputs=inputs, outputs=tuple(outputs), vec=given["temb"].detach())

    return hook

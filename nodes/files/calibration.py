"""Calibration of a conversion inside ComfyUI: a dense FLUX samples prompts while its blocks' inputs are recorded.

The teacher samples from noise with ComfyUI's own sampler, and only forward passes are recorded (see
d2m_model/conversion/calibration.py). Neurons' importance is that of their activation: Taylor importance would need a
backward pass, with several times the memory of sampling, and gain nothing (docs/training-free.md).

Shapes: B batch, T tokens, H hidden size, V pooled width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...d2m_model.blocks import Block
from ...d2m_model.config import BlockGroup, FluxMoEConfig
from ...d2m_model.conversion.block_routers import FEWEST
from ...d2m_model.conversion.calibration import Calibration, write_part
from ...d2m_model.conversion.options import OPTIONS
from ...d2m_model.conversion.recorder import Recorder
from ...d2m_model.conversion.split import generator_for
from ...d2m_model.layout import ffn_tensors
from ...d2m_model.stand_ins import streams_of

TOKENS_PER_FFN: int = OPTIONS["tokens"].default  # inputs kept of every FFN, over the whole calibration
_PIXELS = 8  # pixels on the side of a latent
_TEXT_ENTRIES = ("pooled_output", "attention_mask")  # entries of a conditioning that have a batch axis, like its text

_Prompt = list  # a list of one [text, options], as comfy.sample takes it


@dataclass(kw_only=True, slots=True, frozen=True)
class CalibrationSamples:
    """Images to sample: `samples` images with sides of `size` pixels, prompt after prompt, each in `steps` evaluations."""

    samples: int
    steps: int
    size: int
    seed: int

    @property
    def evaluations(self) -> int:
        return self.samples * self.steps


def split_prompts(conditioning: Sequence[Any]) -> list[_Prompt]:
    """Split a CONDITIONING into its prompts, which may be combined or in a batch. Raises ValueError if there is none."""
    prompts = []
    for text, options in conditioning:
        for index in range(len(text)):
            own = {
                key: value[index % len(value)][None] if key in _TEXT_ENTRIES and isinstance(value, Tensor) else value
                for key, value in options.items()
            }
            prompts.append([[text[index][None], own]])
    if not prompts:
        raise ValueError("The calibration prompts are empty. Connect the CONDITIONING of one prompt or more.")
    return prompts


def calibrate_on_prompts(
    model: Any,
    config: FluxMoEConfig,
    prompts: Sequence[_Prompt],
    settings: CalibrationSamples,
    folder: Path,
    progress: Callable[[], object],
) -> Calibration:
    """Sample the prompts with the teacher in `model` and record in `folder` what converting it to `config` needs.

    Patches of weights and of sampling apply. Other packs' patches of blocks, wrappers and compiled graphs do not, since
    only weights are converted. `progress` is called after every evaluation. Raises ValueError for too few evaluations.
    """
    if config.groups and settings.evaluations < FEWEST:
        raise ValueError(
            f"Block routers need {FEWEST} evaluations of the model or more to be fitted; these are {settings.evaluations} "
            f"({settings.samples} samples of {settings.steps} steps). Raise samples or steps."
        )
    plain = model.clone()
    plain.model_options = {"transformer_options": {}}
    plain.wrappers, plain.callbacks = WrappersMP.init_wrappers(), CallbacksMP.init_callbacks()
    plain.object_patches = sampling_patches(model)
    files = []
    for index in range(settings.samples):
        prompt = prompts[index % len(prompts)]
        generator = generator_for(settings.seed, f"sample {index}")
        recorder = Recorder(-(-TOKENS_PER_FFN // settings.evaluations), generator)
        channels = model.model.latent_format.latent_channels
        noise = torch.randn(1, channels, settings.size // _PIXELS, settings.size // _PIXELS, generator=generator)
        with FluxHooks(model.model.diffusion_model, config, recorder).attached():
            comfy.sample.sample(
                plain, noise, settings.steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise),
                callback=lambda *_: progress(), disable_pbar=True, seed=settings.seed + index,
            )  # fmt: skip
        files.append(folder / f"sample-{index:05}.safetensors")
        write_part(files[-1], recorder.tensors(), {})
    return Calibration(files, few=True)


def sampling_patches(model: Any) -> dict[str, Any]:
    """Return the patches of noise levels, as by ModelSamplingFlux, which belong to no weights."""
    return {key: patch for key, patch in model.object_patches.items() if key == "model_sampling"}


class FluxHooks:
    """Hooks on a ComfyUI Flux that feed a Recorder while it samples one image."""

    def __init__(self, flux: Any, config: FluxMoEConfig, recorder: Recorder) -> None:
        self.flux, self.config, self.recorder = flux, config, recorder

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for ffn in self.config.ffns:
                handles.append(self._hook_ffn(ffn))
            for group in self.config.groups:
                handles.append(self._hook_group(group))
                for block in group.members:
                    handles += self._hook_block(block)
            if self.config.adaln_rank is not None:
                handles.append(self.flux.vector_in.register_forward_hook(self._silu_vecs))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_ffn(self, ffn: str) -> Any:
        up = self.flux.get_submodule(ffn_tensors(ffn, self.config.dims.hidden_size).up)

        def enter(_: Any, arguments: tuple[Tensor, ...]) -> None:
            self.recorder.ffn_inputs(ffn, arguments[0].flatten(0, -2))

        return up.register_forward_pre_hook(enter)

    def _hook_group(self, group: BlockGroup) -> Any:
        """Record what the group's router will read, before its first block; vec with the first group."""
        name = group.members[0].name
        block = self.flux.get_submodule(name)

        def enter(_: Any, arguments: tuple, keywords: dict) -> None:
            inputs = inputs_by_name(block, arguments, keywords)
            vec_BH = inputs["vec"] if group == self.config.groups[0] else None
            self.recorder.block_inputs(name, streams_in(inputs), vec_BH)

        return block.register_forward_pre_hook(enter, with_kwargs=True)

    def _hook_block(self, place: Block) -> list[Any]:
        """Record how a block changes its streams."""
        name = place.name
        block = self.flux.get_submodule(name)
        before: list[Tensor] = []

        def enter(_: Any, arguments: tuple, keywords: dict) -> None:
            before[:] = [stream.clone() for stream in streams_in(inputs_by_name(block, arguments, keywords))]

        def leave(_: Any, arguments: tuple, keywords: dict, output: Tensor | tuple[Tensor, ...]) -> None:
            after = output if isinstance(output, tuple) else (output,)
            image = slice(before[0].shape[1])
            if len(before) == 1:  # one stream, text first
                inputs = inputs_by_name(block, arguments, keywords)
                image = slice(inputs["transformer_options"]["img_slice"][0], None)
            self.recorder.block_change(name, before, after, image)
            if self.config.stand_in_rank is not None:
                for stream, old, new in zip(streams_of(place), before, after, strict=True):
                    self.recorder.stream_change(name, stream, old, new)
            before.clear()

        return [
            block.register_forward_pre_hook(enter, with_kwargs=True),  # blocks write in place
            block.register_forward_hook(leave, with_kwargs=True),
        ]

    def _silu_vecs(self, module: Any, arguments: tuple[Tensor, ...], vector_BH: Tensor) -> None:
        """Record the sample's conditioning vectors, once."""
        if not self.recorder.has("silu_vec"):
            self.recorder.silu_vecs(vector_BH, self.config.dims.guidance_embed, self._vec)

    def _vec(self, vector_nH: Tensor, t_n: Tensor, guidance_n: Tensor | None) -> Tensor:
        def embedded(values_n: Tensor) -> Tensor:
            return timestep_embedding(values_n.to(vector_nH.device), 256).to(vector_nH)

        vec_nH: Tensor = vector_nH + self.flux.time_in(embedded(t_n))
        return vec_nH if guidance_n is None else vec_nH + self.flux.guidance_in(embedded(guidance_n))


def inputs_by_name(block: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a block was called with, by name."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    return dict(zip(names, arguments, strict=False)) | dict(keywords)


def streams_in(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return a block's input streams: image and text of a double block, the one stream of a single block."""
    return [inputs["img"], inputs["txt"]] if "img" in inputs else [inputs["x"]]

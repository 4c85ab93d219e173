"""What a conversion asks of a dense FLUX inside ComfyUI: it paints the prompts, and what its blocks see is written down.

The teacher walks its own trajectories from noise, with ComfyUI's own sampling, and all that is recorded comes from the
forward passes (see d2m_model/conversion/calibration.py): neurons' importance by their activation, for which a backward
pass of Taylor's would take several times the memory of sampling and gain nothing (docs/training-free.md).

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
import torch.nn.functional as F
from comfy.ldm.flux.layers import timestep_embedding
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...d2m_model.config import BlockGroup, FluxMoEConfig
from ...d2m_model.conversion.block_routers import FEWEST
from ...d2m_model.conversion.calibration import GUIDANCE, VECS_PER_SAMPLE, Calibration, write_part
from ...d2m_model.conversion.split import generator_for
from ...d2m_model.layout import ffn_tensors
from ...d2m_model.mob import mean_tokens

TOKENS = 8192  # inputs kept of every FFN, in all
PIXELS = 8  # of an image on the side of a latent
TEXT_ENTRIES = ("pooled_output", "attention_mask")  # of a conditioning, which have a batch like its text

Prompt = list  # one [text, options] in a list, as comfy.sample takes it


@dataclass(kw_only=True, slots=True, frozen=True)
class CalibrationSettings:
    """`samples` images of `size` pixels on the side, prompt after prompt, each in `steps` evaluations."""

    samples: int
    steps: int
    size: int
    seed: int

    @property
    def evaluations(self) -> int:
        return self.samples * self.steps


def prompts_of(conditioning: Sequence[Any]) -> list[Prompt]:
    """Each prompt of a CONDITIONING by itself: combined ones, and those of a batch. Raises ValueError if there is none."""
    prompts = []
    for text, options in conditioning:
        for index in range(len(text)):
            own = {
                key: value[index % len(value)][None] if key in TEXT_ENTRIES and isinstance(value, Tensor) else value
                for key, value in options.items()
            }
            prompts.append([[text[index][None], own]])
    if not prompts:
        raise ValueError("The calibration prompts are empty. Connect the CONDITIONING of one prompt or more.")
    return prompts


def calibrate(
    model: Any,
    config: FluxMoEConfig,
    prompts: Sequence[Prompt],
    settings: CalibrationSettings,
    folder: Path,
    progress: Callable[[], object],
) -> Calibration:
    """Sample the prompts with the teacher in `model` and keep in `folder` what converting it to `config` needs.

    Patches of weights and of sampling count; other packs' patches of blocks, wrappers and compiled graphs are left out: it
    is the weights that are converted. `progress` hears of every evaluation. Raises ValueError for too few evaluations.
    """
    if config.groups and settings.evaluations < FEWEST:
        raise ValueError(
            f"Block routers are fitted to {FEWEST} evaluations of the model or more; these are {settings.evaluations} "
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
        recorder = Recorder(model.model.diffusion_model, config, -(-TOKENS // settings.evaluations), generator)
        channels = model.model.latent_format.latent_channels
        noise = torch.randn(1, channels, settings.size // PIXELS, settings.size // PIXELS, generator=generator)
        with recorder.recording():
            comfy.sample.sample(
                plain, noise, settings.steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise),
                callback=lambda *_: progress(), disable_pbar=True, seed=settings.seed + index,
            )  # fmt: skip
        files.append(folder / f"sample-{index:05}.safetensors")
        write_part(files[-1], recorder.tensors(), {})
    return Calibration(files, few=True)


def sampling_patches(model: Any) -> dict[str, Any]:
    """The patches by which ModelSamplingFlux and its kind steer the noise levels: of no model's weights."""
    return {key: patch for key, patch in model.object_patches.items() if key == "model_sampling"}


class Recorder:
    """Listens to a ComfyUI Flux while it samples one image, by hooks that go when it ends."""

    def __init__(self, flux: Any, config: FluxMoEConfig, tokens: int, generator: torch.Generator) -> None:
        self.flux, self.config = flux, config
        self.count, self.generator = tokens, generator  # of tokens kept at every evaluation
        self._found: dict[str, list[Tensor]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """By the names of a calibration's parts."""
        return {name: torch.cat(parts) for name, parts in self._found.items()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for ffn in self.config.ffns:
                up = self.flux.get_submodule(ffn_tensors(ffn, self.config.dims.hidden_size).up)
                handles.append(up.register_forward_pre_hook(self._hook_of_ffn(ffn)))
            for group in self.config.groups:
                handles += self._watch_group_at(group)
                for block in group.members:
                    handles += self._watch_block(block.name)
            if self.config.adaln_rank is not None:
                handles.append(self.flux.vector_in.register_forward_hook(self._vecs))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._found.setdefault(name, []).append(tensor.detach().to("cpu", copy=True))

    def _hook_of_ffn(self, ffn: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Tensor, ...]) -> None:
            x_TH = arguments[0].flatten(0, -2)
            chosen = torch.randperm(len(x_TH), generator=self.generator)[: self.count]
            self._keep(f"inputs.{ffn}", x_TH[chosen.to(x_TH.device)])

        return hook

    def _watch_group_at(self, group: BlockGroup) -> list[Any]:
        """What the group's router will see, ahead of its first block; vec, which all blocks get, at the first group."""
        name = group.members[0].name
        block = self.flux.get_submodule(name)

        def enter(_: Any, arguments: tuple, keywords: dict) -> None:
            given = given_to(block, arguments, keywords)
            self._keep(f"mean.{name}", mean_tokens(*streams_of(given)))
            if group == self.config.groups[0]:
                self._keep("vec", given["vec"].float())

        return [block.register_forward_pre_hook(enter, with_kwargs=True)]

    def _watch_block(self, name: str) -> list[Any]:
        """What it does to its streams."""
        block = self.flux.get_submodule(name)
        before: list[Tensor] = []

        def enter(_: Any, arguments: tuple, keywords: dict) -> None:
            before[:] = [stream.clone() for stream in streams_of(given_to(block, arguments, keywords))]

        def leave(_: Any, arguments: tuple, keywords: dict, found: Tensor | tuple[Tensor, ...]) -> None:
            after = found if isinstance(found, tuple) else (found,)
            changes = [(new - old).float().square().mean(2) for old, new in zip(before, after, strict=True)]
            before.clear()
            all_BT = torch.cat(changes, 1)
            if len(changes) > 1:
                image_BT = changes[0]
            else:  # text first, in one stream
                image_BT = all_BT[:, given_to(block, arguments, keywords)["transformer_options"]["img_slice"][0] :]
            self._keep(f"change.{name}", torch.stack([all_BT.mean(1), image_BT.mean(1)], 1))

        return [
            block.register_forward_pre_hook(enter, with_kwargs=True),  # blocks write in place
            block.register_forward_hook(leave, with_kwargs=True),
        ]

    def _vecs(self, module: Any, arguments: tuple[Tensor, ...], vector_BH: Tensor) -> None:
        """Of the sample's pooled text under other timesteps and guidances, once."""
        if "silu_vec" in self._found:
            return
        place = {"device": vector_BH.device, "dtype": vector_BH.dtype}
        vec_nH = vector_BH.repeat_interleave(VECS_PER_SAMPLE, 0)

        def embedded(values_n: Tensor) -> Tensor:
            return timestep_embedding(values_n.to(vector_BH.device), 256).to(**place)

        vec_nH = vec_nH + self.flux.time_in(embedded(torch.rand(len(vec_nH), generator=self.generator)))
        if self.config.dims.guidance_embed:
            low, high = GUIDANCE
            guidance_n = low + (high - low) * torch.rand(len(vec_nH), generator=self.generator)
            vec_nH = vec_nH + self.flux.guidance_in(embedded(guidance_n))
        self._keep("silu_vec", F.silu(vec_nH.float()))


def given_to(block: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What a block was called with, by name."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    return dict(zip(names, arguments, strict=False)) | dict(keywords)


def streams_of(given: Mapping[str, Any]) -> list[Tensor]:
    return [given["img"], given["txt"]] if "img" in given else [given["x"]]

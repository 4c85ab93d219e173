"""Calibration data, and the flow-matching loss on it.

Shapes: B batch, T image tokens, C channels of a token, L text tokens, D context width, V pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from d2m_model.config import FluxDims
from d2m_model.conversion.importance import TaylorImportance
from d2m_model.tensor_file import TensorFile

from . import UserError

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

GUIDANCE = (1.5, 5.0)  # a guidance-distilled teacher is asked with values of this range
FILE_FORMAT = (
    "a .safetensors with `latents` [N, channels, height, width] in FLUX's model space ((latent - 0.1159) * 0.3611), "
    "`context` [N, text tokens, width], `pooled` [N, width], and optionally `guidance` [N]"
)


@dataclass(kw_only=True, slots=True)
class CalibrationBatch:
    """What a FLUX is asked with, but for noise and timestep. Float32, on the CPU."""

    tokens_BTC: Tensor
    context_BLD: Tensor
    pooled_BV: Tensor
    guidance_B: Tensor
    image_ids_T3: Tensor
    text_ids_L3: Tensor


class CalibrationData(Protocol):
    """A source of samples; `name` stands in the file's provenance."""

    name: str

    def batches(self, count: int, size: int, seed: int) -> Iterator[CalibrationBatch]: ...


def batch_of(latents: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor) -> CalibrationBatch:
    """From latents [B, channels, height, width], cut into FLUX's 2 x 2 patches."""
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return CalibrationBatch(
        tokens_BTC=rearrange(latents.float(), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        context_BLD=context.float(),
        pooled_BV=pooled.float(),
        guidance_B=guidance.float(),
        image_ids_T3=ids.flatten(0, 1),
        text_ids_L3=torch.zeros(context.shape[1], 3),
    )


class EmojiData:
    """The demo's dataset through the demo's autoencoder and prompt encoder: any number of real images."""

    name = "emoji"

    # The demo is imported here alone: without it every other command works.

    def __init__(self, assets: Path | None = None) -> None:
        try:
            from demo import autoencoder, dataset, prompt_encoder
        except ModuleNotFoundError as error:
            if error.name != "demo":
                raise
            raise UserError("--data emoji is the demo's dataset: run from the repository's root.") from None
        assets = assets or dataset.ASSETS
        for asset in ("autoencoder", "prompt-encoder"):
            if not (assets / f"{asset}.safetensors").is_file():
                raise UserError(f"{assets / asset}.safetensors is missing; demo/README.md says how to make it.")
        self.dataset = dataset
        self.autoencoder = autoencoder.Autoencoder.load(assets / "autoencoder.safetensors")
        self.prompts = prompt_encoder.load(assets / "prompt-encoder.safetensors")

    def batches(self, count: int, size: int, seed: int) -> Iterator[CalibrationBatch]:
        generator = np.random.default_rng(seed)
        for _ in range(count):
            pictures = [self.dataset.random_picture(generator) for _ in range(size)]
            images = torch.stack([self.dataset.render(picture) for picture in pictures])
            with torch.autocast("cpu", dtype=torch.bfloat16):  # most of the time goes here; off by 0.7 %
                latents = self.autoencoder.encode(images)
            templates = generator.integers(len(self.dataset.TEMPLATES), size=size)
            captions = [picture.caption(int(template)) for picture, template in zip(pictures, templates, strict=True)]
            context, pooled = self.prompts.encode(captions)
            yield batch_of(latents, context, pooled, torch.from_numpy(generator.uniform(*GUIDANCE, size)))


class FileData:
    """Precomputed latents and text features, so that a real FLUX is calibrated without its text encoders."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.file = TensorFile(path)
        shapes = self.file.shapes
        axes = {"latents": 4, "context": 3, "pooled": 2} | ({"guidance": 1} if "guidance" in shapes else {})
        for name, count in axes.items():
            found = shapes.get(name)
            if found is None or len(found) != count or found[0] != shapes["latents"][0]:
                raise UserError(f"{path}: {name} is {found and list(found)}; expected {FILE_FORMAT}.")
        if shapes["latents"][2] % 2 or shapes["latents"][3] % 2 or shapes["latents"][0] == 0:
            raise UserError(f"{path}: latents is {list(shapes['latents'])}; expected samples of even height and width.")

    def batches(self, count: int, size: int, seed: int) -> Iterator[CalibrationBatch]:
        """The samples in random order, from the start again when they run out."""
        tensors = {name: self.file.tensor(name) for name in self.file.shapes}
        generator = np.random.default_rng(seed)
        samples = len(tensors["latents"])
        passes = -(-count * size // samples)
        order = torch.from_numpy(np.concatenate([generator.permutation(samples) for _ in range(passes)]))
        for chosen in order[: count * size].split(size):
            guidance = torch.from_numpy(generator.uniform(*GUIDANCE, size))
            if "guidance" in tensors:
                guidance = tensors["guidance"][chosen]
            yield batch_of(tensors["latents"][chosen], tensors["context"][chosen], tensors["pooled"][chosen], guidance)


def open_data(name: str) -> CalibrationData:
    """`emoji`, or the path of a file of FILE_FORMAT."""
    return EmojiData() if name == "emoji" else FileData(Path(name))


def check_fits(batch: CalibrationBatch, dims: FluxDims) -> None:
    """Raises UserError if the data are not of this FLUX's widths."""
    for what, found, expected in (
        ("image tokens", batch.tokens_BTC.shape[-1], dims.in_channels),
        ("context", batch.context_BLD.shape[-1], dims.context_size),
        ("pooled text", batch.pooled_BV.shape[-1], dims.vector_size),
    ):
        if found != expected:
            raise UserError(f"The calibration data's {what} are {found} wide; this teacher's are {expected}.")


def flow_matching_loss(
    model: FluxTransformer2DModel, batch: CalibrationBatch, t_B: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the model's velocity against noise - image, at noise levels t in 0..1."""
    parameter = next(model.parameters())
    place = {"device": parameter.device, "dtype": parameter.dtype}
    noise = torch.randn(batch.tokens_BTC.shape, generator=generator)
    velocity = model(
        hidden_states=torch.lerp(batch.tokens_BTC, noise, t_B[:, None, None]).to(**place),
        encoder_hidden_states=batch.context_BLD.to(**place),
        pooled_projections=batch.pooled_BV.to(**place),
        timestep=t_B.to(**place),
        guidance=batch.guidance_B.to(**place) if model.config.guidance_embeds else None,
        img_ids=batch.image_ids_T3.to(parameter.device),
        txt_ids=batch.text_ids_L3.to(parameter.device),
        return_dict=False,
    )[0]
    return (velocity.float() - (noise - batch.tokens_BTC).to(parameter.device)).square().mean()


def taylor_importance(
    model: FluxTransformer2DModel,
    data: CalibrationData,
    *,
    batches: int,
    batch_size: int,
    seed: int,
    progress: Callable[[float], object] = lambda loss: None,
) -> dict[str, Tensor]:
    """Importance of every FFN's neurons by Eq. 6, float32 [N] by FFN name. The model's other parameters are frozen.

    Timesteps are stratified: every one of the batches * batch_size samples has its own slice of 0..1.
    """
    from d2m_model.hosts.diffusers import dims_of_transformer, ffn_linears

    generator = torch.Generator().manual_seed(seed)
    total = batches * batch_size
    levels = (torch.randperm(total, generator=generator) + torch.rand(total, generator=generator)) / total
    taylor = TaylorImportance.of(model, ffn_linears(model))
    for batch, t_B in zip(data.batches(batches, batch_size, seed), levels.split(batch_size), strict=True):
        check_fits(batch, dims_of_transformer(model))
        loss = flow_matching_loss(model, batch, t_B, generator)
        loss.backward()
        progress(float(loss.detach()))
    return taylor.close()

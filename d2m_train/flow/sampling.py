"""Images of a FLUX in diffusers, teacher or student: Euler's method on FLUX's shifted grid of noise levels.

The noise of an image depends on its seed alone and is drawn in the layout of latents, so that a seed gives the same noise
here, in the demo and for the teacher.

Shapes: B batch, T image tokens, C channels of a token, P pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from d2m_model.atomic import atomic_file

from .. import UserError
from ..data.batch import Batch, DataSource, prompt_batch
from ..run_config import EyesSection, TimestepsSection
from .held_out import held_out_seed
from .noise import channels_of, grid, time_shift, trajectory
from .velocity import evaluating

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel
    from PIL.Image import Image

_MOST_TOKENS = 16_384  # image tokens of one forward pass: four images of 1024 x 1024
_GAP = 4  # pixels between the images of a grid
_LARGEST = 512  # pixels on the longer side of an image in a grid
_LABEL = 72  # pixels left of a row


def noise_for(seeds: Sequence[int], image_ids_T3: Tensor, channels: int) -> Tensor:
    """Noise [B, T, C], float32: one image per seed."""
    height, width = (int(image_ids_T3[:, axis].max()) + 1 for axis in (1, 2))
    size = (1, channels // 4, 2 * height, 2 * width)
    latents = torch.cat([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def sample(
    model: FluxTransformer2DModel,
    batch: Batch,
    noise_BTC: Tensor,
    *,
    steps: int,
    mu: float,
    progress: Callable[[int], object] = lambda done: None,
    size: int | None = None,
    guided: bool | None = None,
) -> Tensor:
    """Sample images from the noise, with the prompts of `batch`: tokens [B, T, C], float32 on the CPU.

    `mu` is FLUX's time shift (noise.time_shift). `size` samples run at a time (None: as many as fill a pass of 16,384
    image tokens); `progress` is called with the number that are newly done. `guided` as in noise.trajectory. The model
    stays in its mode.
    """
    levels = grid(steps, mu)
    size = size or max(1, _MOST_TOKENS // noise_BTC.shape[1])
    finished = []
    for start in range(0, len(noise_BTC), size):
        some = slice(start, start + size)
        part = slice_batch(batch, some)
        finished.append(trajectory(model, part, noise_BTC[some], levels, guided).cpu())
        progress(len(finished[-1]))
    return torch.cat(finished)


def slice_batch(batch: Batch, some: slice) -> Batch:
    """Some of a batch's samples."""
    return replace(
        batch,
        tokens_BTC=None if batch.tokens_BTC is None else batch.tokens_BTC[some],
        context_BLD=batch.context_BLD[some],
        pooled_BV=batch.pooled_BV[some],
        guidance_B=batch.guidance_B[some],
        words_BL=batch.words_BL[some],
        captions=batch.captions[some],
    )


# Grids during training


@dataclass(kw_only=True, slots=True)
class SampleGrid:
    """Fixed prompts and noise, whose images by the student are drawn below those by the teacher, which are made once.

    Without an autoencoder in the data source there are no images, and `draw` returns None.
    """

    batch: Batch
    noise_BTC: Tensor
    teacher: Tensor | None  # images [B, 3, P, P]
    data: DataSource
    steps: int
    mu: float
    guided: bool

    @torch.no_grad()
    def draw(self, student: nn.Module, every_block: bool = False) -> Image | None:
        """Sample in eval mode (see velocity.evaluating) and draw. Every rank of a sharded run calls this."""
        if self.teacher is None:
            return None
        with evaluating(student, every_block):
            tokens_BTC = sample(student, self.batch, self.noise_BTC, steps=self.steps, mu=self.mu, guided=self.guided)
        images = self.data.decode(tokens_BTC, self.batch.image_ids_T3)
        assert images is not None  # the teacher's were decoded
        return draw_grid({"teacher": self.teacher, "student": images}, self.batch.captions)


@torch.no_grad()
def new_sample_grid(
    data: DataSource, teacher: FluxTransformer2DModel, section: EyesSection, timesteps: TimestepsSection, seed: int
) -> SampleGrid:
    """A grid of the section's prompts, or else of the captions of held-out samples, with the teacher's images.

    A few-step teacher (timesteps.sampling `teacher_grid`) takes the steps of its own grid. Raises UserError where there
    are prompts but the data source has no text encoders.
    """
    example = data.batch(0, section.samples or 1, held_out_seed(seed), held_out=True)
    if section.prompts:
        texts = data.encode_prompts(section.prompts)
        height, width = (int(example.image_ids_T3[:, axis].max()) + 1 for axis in (1, 2))
        example = prompt_batch(texts, torch.zeros(len(section.prompts)), (16 * width, 16 * height))
        example.captions = tuple(section.prompts)
    batch = replace(example, tokens_BTC=None, guidance_B=torch.full((len(example.pooled_BV),), section.sample_guidance))
    noise_BTC = noise_for(range(len(batch.pooled_BV)), batch.image_ids_T3, channels_of(teacher))
    steps = timesteps.grid_steps if timesteps.sampling == "teacher_grid" else section.sample_steps
    mu = time_shift(noise_BTC.shape[1], timesteps)
    images = None
    if section.samples and data.decode(noise_BTC[:1], batch.image_ids_T3) is not None:
        images = data.decode(sample(teacher, batch, noise_BTC, steps=steps, mu=mu), batch.image_ids_T3)
    return SampleGrid(
        batch=batch,
        noise_BTC=noise_BTC,
        teacher=images,
        data=data,
        steps=steps,
        mu=mu,
        guided=teacher.config.guidance_embeds,
    )


# Pictures


def pil_image(image: Tensor) -> Image:
    """Convert an image [3, P, P] in 0..1."""
    from PIL import Image

    return Image.fromarray(image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def draw_grid(rows: dict[str, Tensor], captions: Sequence[str] = ()) -> Image:
    """Draw a row of images [B, 3, P, P] per name, with the name to its left and captions below the columns."""
    from PIL import Image, ImageDraw, ImageFont

    rows = {name: _shrunk(images) for name, images in rows.items()}
    first = next(iter(rows.values()))
    count, (height, width) = len(first), first.shape[-2:]
    bottom = _GAP + len(rows) * (height + _GAP)
    size = (_LABEL + count * (width + _GAP), bottom + (3 * 14 if captions else 0))
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for column, caption in enumerate(captions):
        text = "\n".join(_wrapped(caption, font.getlength, width)[:3])
        draw.multiline_text((_LABEL + column * (width + _GAP), bottom), text, fill="black", font=font, spacing=2)
    for row, (name, images) in enumerate(rows.items()):
        y = _GAP + row * (height + _GAP)
        draw.text((4, y + height // 2 - 6), name, fill="black", font=font)
        for column, image in enumerate(images):
            picture.paste(pil_image(image), (_LABEL + column * (width + _GAP), y))
    return picture


def _shrunk(images: Tensor) -> Tensor:
    """Shrink images to at most 512 pixels a side, so that a grid of 1024 x 1024 images stays small enough to view."""
    factor = _LARGEST / max(images.shape[-2:])
    if factor >= 1:
        return images
    height, width = (round(factor * side) for side in images.shape[-2:])
    return torch.nn.functional.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def _wrapped(text: str, length: Callable[[str], float], width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; a longer word gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and length(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_png(image: Image, file: Path) -> None:
    """Write an image atomically. Raises UserError if the folder cannot be written to."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as part:
            image.save(part, "PNG")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}).") from None

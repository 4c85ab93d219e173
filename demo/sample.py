"""Sampling of the emoji FLUX without ComfyUI: its `euler` sampler on its `simple` schedule for FLUX (shift 1.15)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from demo.dataset import IMAGE
from demo.prompt_encoder import PromptEncoder
from demo.train import patchify, predict_velocity, unpatchify

_SHIFT = 1.15  # ComfyUI's value for FLUX when no ModelSamplingFlux node sets another
_LATENT_CHANNELS = 16


def sigmas(steps: int) -> Tensor:
    """Return noise levels from 1 to 0, [steps + 1]."""
    t = torch.linspace(1, 0, steps + 1)
    return math.exp(_SHIFT) / (math.exp(_SHIFT) + 1 / t.clamp_min(1e-9) - 1) * (t > 0)


def emoji_noise(seeds: Sequence[int]) -> Tensor:
    """Return noise [B, 16, 16, 16]. It is drawn sample by sample, so that it depends on each sample's seed alone."""
    size = (1, _LATENT_CHANNELS, IMAGE // 8, IMAGE // 8)
    return torch.cat([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample_latents(
    transformer: nn.Module,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 3.5,
    seeds: Sequence[int] | None = None,
    batch: int = 50,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return latents [len(prompts), 16, 16, 16] in FLUX's model space. Seed i belongs to prompt i (default: 0, 1, …).

    `progress` is called with the number of images that each batch has finished.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    levels = sigmas(steps)
    finished = []
    for start in range(0, len(prompts), batch):
        context, pooled = encoder.encode(list(prompts[start : start + batch]))
        tokens = patchify(emoji_noise(seeds[start : start + batch]))
        count = len(tokens)
        for now, following in itertools.pairwise(levels):
            flow = predict_velocity(
                transformer, tokens, now.expand(count), context, pooled, torch.full((count,), guidance)
            )
            tokens = tokens + (following - now) * flow.float()
        finished.append(unpatchify(tokens, IMAGE // 16))
        progress(count)
    return torch.cat(finished)


def save_grid(images: Tensor, file: Path, columns: int) -> None:
    """Write images [N, 3, H, W] in 0..1 as one picture with `columns` images in a row."""
    from torchvision.utils import save_image

    save_image(images, file, nrow=columns, padding=2)

"""Sample the emoji FLUX outside ComfyUI, with ComfyUI's `euler` on its `simple` schedule for FLUX (shift 1.15)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from demo.dataset import IMAGE
from demo.prompt_encoder import PromptEncoder
from demo.train import to_latents, to_tokens, velocity

SHIFT = 1.15  # ComfyUI's for FLUX when no ModelSamplingFlux node sets another
LATENT_CHANNELS = 16


def sigmas(steps: int) -> Tensor:
    """[steps + 1] noise levels from 1 to 0."""
    t = torch.linspace(1, 0, steps + 1)
    return math.exp(SHIFT) / (math.exp(SHIFT) + 1 / t.clamp_min(1e-9) - 1) * (t > 0)


def noise_for(seeds: Sequence[int]) -> Tensor:
    """[B, 16, 16, 16], sample by sample, so that a sample's noise depends on its seed alone."""
    size = (1, LATENT_CHANNELS, IMAGE // 8, IMAGE // 8)
    return torch.cat([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
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
    """Latents [len(prompts), 16, 16, 16] in FLUX's model space; seed i belongs to prompt i (default: 0, 1, ...)."""
    seeds = range(len(prompts)) if seeds is None else seeds
    levels = sigmas(steps)
    finished = []
    for start in range(0, len(prompts), batch):
        context, pooled = encoder.encode(list(prompts[start : start + batch]))
        tokens = to_tokens(noise_for(seeds[start : start + batch]))
        count = len(tokens)
        for now, following in itertools.pairwise(levels):
            flow = velocity(transformer, tokens, now.expand(count), context, pooled, torch.full((count,), guidance))
            tokens = tokens + (following - now) * flow.float()
        finished.append(to_latents(tokens, IMAGE // 16))
        progress(count)
    return torch.cat(finished)


def save_grid(images: Tensor, file: Path, columns: int) -> None:
    """Write [N, 3, H, W] images in 0..1 as one picture, `columns` to a row."""
    from torchvision.utils import save_image

    save_image(images, file, nrow=columns, padding=2)

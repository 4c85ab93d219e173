"""Scores of images, prompt by prompt, and confidence intervals of their means.

Every score is a number per prompt (the mean of its images), so that intervals come from resampling prompts, and two
files are compared prompt by prompt from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..data.emoji import picture_hits
from .image_folder import ImageFolder
from .prompts import Prompt

_DRAWS = 10_000
LEVEL = 0.95

Scores = dict[str, np.ndarray]  # by name, one number per prompt


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """A mean and its bootstrap confidence interval over prompts, at LEVEL."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in asdict(self).items()}


def interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of `values` and its interval: percentiles of the means of _DRAWS samples, drawn with replacement."""
    from scipy.stats import bootstrap

    mean = float(values.mean())
    if len(values) == 1:  # which scipy refuses
        return Interval(mean=mean, low=mean, high=mean)
    # In batches, so that memory does not grow with the prompts.
    result = bootstrap(
        (values,), np.mean, n_resamples=_DRAWS, batch=100, confidence_level=LEVEL, method="percentile", rng=seed
    )
    low, high = result.confidence_interval
    return Interval(mean=mean, low=float(low), high=float(high))


def score_images(folder: ImageFolder, reference: ImageFolder | None, clip: Clip | None) -> Scores:
    """Score a folder's images: `object`, `colour`, `position` and `retrieval` of emoji prompts; `clip_score` with `clip`;
    `teacher_distance` with `reference`.
    """
    parts: list[Scores] = []
    for number in range(folder.seeds):
        images = folder.images(number)
        scores: Scores = {}
        if all(prompt.picture is not None for prompt in folder.prompts):
            scores |= emoji_scores(images, folder.prompts)
        if clip is not None:
            texts = [prompt.text for prompt in folder.prompts]
            scores["clip_score"] = np.array([clip(image, text) for image, text in zip(images, texts, strict=True)])
        if reference is not None:
            scores["teacher_distance"] = distances(folder.latents(number), reference.latents(number))
        parts.append(scores)
    return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}


def emoji_scores(images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Score uint8 images [N, 3, 128, 128] with the demo's scorer: 1 where an image is right, else 0."""
    hits = picture_hits(images.float() / 255, [prompt.picture for prompt in prompts])
    return {name: hit.numpy().astype(float) for name, hit in hits.items()}


def distances(latents_BTC: Tensor, reference_BTC: Tensor) -> np.ndarray:
    """Return ||a - b|| / ||b|| of each image: its distance to the teacher's from the same noise."""
    difference_B = (latents_BTC - reference_BTC).flatten(1).norm(dim=1)
    relative: np.ndarray = (difference_B / reference_BTC.flatten(1).norm(dim=1)).double().numpy()
    return relative


class Clip:
    """torchmetrics' CLIPScore of one image: 100 times the cosine of image and text, or 0 if it is negative."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        """`folder`: a CLIPModel and its processor, as transformers saves them. Raises UserError if they are missing."""
        from transformers import CLIPModel, CLIPProcessor

        class Features(CLIPModel):
            """CLIPModel that returns pooled features, as torchmetrics expects; transformers 5 returns an object."""

            def get_image_features(self, *arguments: Any, **keywords: Any) -> Tensor:
                return _pooled(super().get_image_features(*arguments, **keywords))

            def get_text_features(self, *arguments: Any, **keywords: Any) -> Tensor:
                return _pooled(super().get_text_features(*arguments, **keywords))

        if not (folder / "config.json").is_file():
            raise UserError(f"--clip {folder}: expected a folder with a CLIP model and its processor (config.json, …).")
        try:
            model = Features.from_pretrained(folder, local_files_only=True).to(device).eval()
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--clip {folder}: not a CLIP model with its processor ({reason}).") from None
        self._parts: Callable[[], tuple[Any, Any]] = lambda: (model, processor)
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Tensor, text: str) -> float:
        """Score a uint8 image [3, height, width]."""
        from torchmetrics.functional.multimodal import clip_score

        return float(clip_score(image.to(self.device), text, self._parts))


def _pooled(features: Any) -> Tensor:
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled

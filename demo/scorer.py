"""Recipe step 4: a scorer, in the place of GenEval. Does a picture show what its prompt says?

    python -m demo.scorer --out runs/scorer        trains the classifier on renders (a few minutes on 2 cores)

`Scorer.score` returns the accuracy of object, colour and position according to the classifier, and a retrieval score
that involves no learning: is the structurally most similar real render (SSIM) one of the right object?
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.dataset import ASSETS, COLOURS, POSITIONS, Picture, objects, random_picture, render

_CLASSIFIER_SIZE = 64  # pixels to which pictures are averaged down for the classifier
_SSIM_SIZE = 32  # pixels for the structural similarity, where the jitter is half a pixel


class Classifier(nn.Module):
    """[B, 3, 128, 128] in 0..1 -> logits of object [B, 300], colour [B, 8], position [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 160)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                              nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in itertools.pairwise(widths)
            )
        )  # fmt: skip
        self.object = nn.Linear(2 * widths[-1], len(objects()))
        self.place = nn.Linear(widths[-1] * 16, len(COLOURS) + len(POSITIONS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.stages(F.interpolate(images, size=(_CLASSIFIER_SIZE, _CLASSIFIER_SIZE), mode="area") * 2 - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        colour, position = self.place(features.flatten(1)).split([len(COLOURS), len(POSITIONS)], 1)
        return self.object(pooled), colour, position


def disturb(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Change blur, noise, brightness, contrast and saturation; make a quarter of the images grey.

    Returns the images, and which of them are not grey (bool [B]).
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator)

    grey = images.mean(1, keepdim=True)
    coloured = uniform(0, 1) >= 0.25
    images = torch.lerp(grey, images, uniform(0.6, 1.3) * coloured)
    average = images.mean((1, 2, 3), keepdim=True)
    images = torch.lerp(average, images, uniform(0.75, 1.2)) + uniform(-0.1, 0.1)
    sharp, half, quarter = images, F.avg_pool2d(images, 2), F.avg_pool2d(images, 4)
    mix = uniform(0, 1)
    blurred = F.interpolate(half, scale_factor=2, mode="bilinear")
    soft = F.interpolate(quarter, scale_factor=4, mode="bilinear")
    images = torch.where(mix < 0.4, sharp, torch.where(mix < 0.8, blurred, soft))
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.08)
    return (images + noise).clamp(0, 1), coloured.flatten()


def _labels(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.tensor([(p.object, p.colour, p.position) for p in pictures])
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _structure(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images at _SSIM_SIZE pixels, their local means and variances (7 x 7 windows)."""
    small = F.interpolate(images, size=(_SSIM_SIZE, _SSIM_SIZE), mode="area")
    mean = F.avg_pool2d(small, 7, stride=1)
    return small, mean, F.avg_pool2d(small * small, 7, stride=1) - mean * mean


def ssim(image: Tensor, references: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the structural similarity [N] of one image [3, H, W] to N references from `_structure`.

    Wang et al. 2004, with 7 x 7 windows.
    """
    small, mean, variance = _structure(image[None])
    other, other_mean, other_variance = references
    covariance = F.avg_pool2d(small * other, 7, stride=1) - mean * other_mean
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean * other_mean + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean**2 + other_mean**2 + c1) * (variance + other_variance + c2))
    return similarity.mean((1, 2, 3))


@cache
def _references(colour: int, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Render every object on one background at one position."""
    pictures = [Picture(object=index, colour=colour, position=position) for index in range(len(objects()))]
    return _structure(torch.stack([render(picture) for picture in pictures]))


class Scorer:
    """Scores of generated images against the pictures that their prompts ask for."""

    def __init__(self, file: Path = ASSETS / "scorer.safetensors") -> None:
        self.classifier = Classifier()
        self.classifier.load_state_dict(
            {name: tensor.float() for name, tensor in load_file(file).items()}, strict=False
        )
        self.classifier.eval()

    @torch.no_grad()
    def hits(self, images: Tensor, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Return which images show the right object, colour and position (bool [N] each)."""
        logits = [self.classifier(part) for part in images.split(50)]
        answers = [torch.cat(parts).argmax(1) for parts in zip(*logits, strict=True)]
        names = ("object", "colour", "position")
        return {name: answer == label for name, answer, label in zip(names, answers, _labels(pictures), strict=True)}

    @torch.no_grad()
    def retrieved(self, images: Tensor, pictures: Sequence[Picture]) -> Tensor:
        """Return for which images the most similar render of their colour and position shows their object (bool [N])."""
        right = []
        for image, picture in zip(images, pictures, strict=True):
            best = int(ssim(image, _references(picture.colour, picture.position)).argmax())
            right.append(best == picture.object)
        return torch.tensor(right)

    def score(self, images: Tensor, pictures: Sequence[Picture]) -> dict[str, float]:
        """Return the means of `hits` and `retrieved`."""
        hits = self.hits(images, pictures) | {"retrieval": self.retrieved(images, pictures)}
        return {name: float(hit.float().mean()) for name, hit in hits.items()}


def latent_distance(latents: Tensor, reference: Tensor) -> float:
    """Return the mean over samples of ||a - b|| / ||b||: the distance to a reference model's latents from the same noise."""
    difference = (latents - reference).flatten(1).norm(dim=1)
    return float((difference / reference.flatten(1).norm(dim=1)).mean())


def ceiling(scorer: Scorer, count: int = 500) -> dict[str, float]:
    """Return the scores of real renders with jitter, a tenth of them of held-out pairs."""
    generator = np.random.default_rng(99)
    pictures = [random_picture(generator, training=index % 10 != 0) for index in range(count)]
    return scorer.score(torch.stack([render(picture) for picture in pictures]), pictures)


def train_scorer(out: Path, assets: Path, steps: int, batch: int) -> None:
    """Train the classifier on disturbed renders, write scorer.safetensors, and print the scores of clean renders."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator, noise = np.random.default_rng(3), torch.Generator().manual_seed(3)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
    start = time.time()
    with (out / "log.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            # Held-out pairs are included: they are held out of the model that is scored, not of its judge.
            pictures = [random_picture(generator, training=generator.random() > 0.1) for _ in range(batch)]
            images, coloured = disturb(torch.stack([render(picture) for picture in pictures]), noise)
            names, colours, places = _labels(pictures)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                thing, colour, position = model(images)
            loss = F.cross_entropy(thing.float(), names) + F.cross_entropy(position.float(), places)
            loss = loss + F.cross_entropy(colour.float()[coloured], colours[coloured])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 100 == 0:
                right = float((thing.argmax(1) == names).float().mean())
                print(
                    json.dumps(
                        {
                            "step": step,
                            "loss": float(loss.detach()),
                            "object": right,
                            "seconds": time.time() - start,
                        }
                    ),
                    file=log,
                    flush=True,
                )
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    save_file(weights, assets / "scorer.safetensors", metadata={"modelspec.title": "Emoji scorer"})
    print(json.dumps({"ceiling": ceiling(Scorer(assets / "scorer.safetensors"))}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scorer"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    train_scorer(arguments.out, arguments.assets, arguments.steps, arguments.batch)

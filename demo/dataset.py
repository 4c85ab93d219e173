"""The emoji dataset: any number of pictures of Noto emoji on coloured backgrounds, with captions.

A picture has one of 300 objects, 8 background colours and 5 positions, with a little jitter of position and size.
A tenth of the (object, colour) pairs is held out of all training and scored separately.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
# In folders that the pack adds to ComfyUI's model folders of these names: nodes/demo.py
EMOJI_TEACHER = ASSETS / "diffusion_models" / "emoji-flux.safetensors"
EMOJI_FLUX_MOE = ASSETS / "diffusion_models" / "emoji-flux-moe.safetensors"
EMOJI_AUTOENCODER = ASSETS / "vae" / "emoji-autoencoder.safetensors"
SEPIA_LORA = ASSETS / "loras" / "emoji-sepia-lora.safetensors"
IMAGE = 128  # pixels
ATLAS_CELL, ATLAS_COLUMNS = 96, 20
SPRITE_SIZES = (80, 83, 86)  # pixels
JITTER = 2  # pixels in each direction
STEP = 16  # pixels from the centre: one transformer token, so that a moved object has the same tokens elsewhere

COLOURS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "red": (215, 45, 45),
    "orange": (245, 150, 40),
    "yellow": (250, 225, 70),
    "green": (60, 165, 75),
    "blue": (50, 105, 215),
    "purple": (140, 70, 170),
}
POSITIONS = {"centre": (0, 0), "left": (-STEP, 0), "right": (STEP, 0), "top": (0, -STEP), "bottom": (0, STEP)}
CAPTION_TEMPLATES = (
    "{object} {position} {colour}",
    "{object} in the {position} on {colour}",
    "a {object} at the {position} , {colour} background",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """Content of a picture: indices into `objects()`, COLOURS and POSITIONS, jitter in pixels, index of the size."""

    object: int
    colour: int
    position: int
    dx: int = 0
    dy: int = 0
    size: int = 1

    def caption(self, template: int = 1) -> str:
        return CAPTION_TEMPLATES[template].format(
            object=objects()[self.object],
            colour=tuple(COLOURS)[self.colour],
            position=tuple(POSITIONS)[self.position],
        )


@cache
def objects() -> tuple[str, ...]:
    """Return the names of the 300 objects, in atlas order."""
    return tuple(json.loads((ASSETS / "objects.json").read_text()))


@cache
def held_out() -> frozenset[tuple[int, int]]:
    """Return the held-out (object, colour) pairs: always the same tenth of all, at most two for one object."""
    generator = np.random.default_rng(2024)
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < len(objects()) * len(COLOURS) // 10:
        pair = (int(generator.integers(len(objects()))), int(generator.integers(len(COLOURS))))
        if sum(pair[0] == other[0] for other in pairs) < 2:
            pairs.add(pair)
    return frozenset(pairs)


@cache
def sprites(size: int) -> torch.Tensor:
    """Return all sprites [300, 4, size, size], float32 in 0..1, colour premultiplied by alpha."""
    atlas = Image.open(ASSETS / "sprites.webp").convert("RGBA")
    cells = []
    for index in range(len(objects())):
        x, y = index % ATLAS_COLUMNS * ATLAS_CELL, index // ATLAS_COLUMNS * ATLAS_CELL
        cell = atlas.crop((x, y, x + ATLAS_CELL, y + ATLAS_CELL)).convert("RGBa")
        cells.append(np.asarray(cell.resize((size, size), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).float() / 255


def render(picture: Picture) -> torch.Tensor:
    """Draw a picture: [3, 128, 128], float32 in 0..1."""
    size = SPRITE_SIZES[picture.size]
    sprite = sprites(size)[picture.object]
    image = torch.tensor(tuple(COLOURS.values())[picture.colour], dtype=torch.float32).div(255)[:, None, None]
    image = image.expand(3, IMAGE, IMAGE).clone()
    x, y = tuple(POSITIONS.values())[picture.position]
    x, y = (IMAGE - size) // 2 + x + picture.dx, (IMAGE - size) // 2 + y + picture.dy
    covered = image[:, y : y + size, x : x + size]
    covered.mul_(1 - sprite[3:]).add_(sprite[:3])
    return image.clamp_(0, 1)


def random_picture(generator: np.random.Generator, *, training: bool = True) -> Picture:
    """Choose a picture with jitter, of a training pair or, with training=False, of a held-out pair."""
    while True:
        pair = (int(generator.integers(len(objects()))), int(generator.integers(len(COLOURS))))
        if (pair in held_out()) != training:
            break
    dx, dy = (int(v) for v in generator.integers(-JITTER, JITTER + 1, 2))
    return Picture(
        object=pair[0],
        colour=pair[1],
        position=int(generator.integers(len(POSITIONS))),
        dx=dx,
        dy=dy,
        size=int(generator.integers(len(SPRITE_SIZES))),
    )


def every_training_picture(generator: np.random.Generator, copies: int = 1) -> list[Picture]:
    """Return each training combination of object, colour and position `copies` times, each with its own jitter."""
    pictures = []
    for index in range(len(objects())):
        for colour in range(len(COLOURS)):
            if (index, colour) in held_out():
                continue
            for position in range(len(POSITIONS)):
                for _ in range(copies):
                    dx, dy = (int(v) for v in generator.integers(-JITTER, JITTER + 1, 2))
                    size = int(generator.integers(len(SPRITE_SIZES)))
                    pictures.append(Picture(object=index, colour=colour, position=position, dx=dx, dy=dy, size=size))
    return pictures


@cache
def prompts() -> tuple[Picture, ...]:
    """Return the 500 fixed prompts of all scores, without jitter: 450 of training pairs, the last 50 of held-out pairs."""
    generator = np.random.default_rng(500)
    chosen = [random_picture(generator) for _ in range(450)]
    chosen += [random_picture(generator, training=False) for _ in range(50)]
    return tuple(Picture(object=p.object, colour=p.colour, position=p.position) for p in chosen)

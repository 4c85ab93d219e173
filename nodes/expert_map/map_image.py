"""Drawing of the expert map (Fig. 7 of the paper): hue is a patch's best expert, opacity how clearly it won.

Regions carry the number of their expert, since twelve hues are hard to tell apart. Shapes: [h, w] patches, [H, W, 3]
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ...d2m_model.config import PATCH_PIXELS
from ...d2m_model.trace_record import NO_EXPERT

Array = np.ndarray[Any, np.dtype[Any]]
Colour = tuple[int, int, int]

# Twelve colours that protanopia, deuteranopia and tritanopia leave distinct: the 12-colour palette of M. Krzywinski,
# "Color palettes for color blindness", in its published order. web/expert_map/palette.mjs has the same.
EXPERT_COLOURS = (
    "#9f0162", "#009f81", "#ff5aaf", "#00fccf", "#8400cd", "#008df9",
    "#00c2f9", "#ffb2fd", "#a40122", "#e20134", "#ff6e3a", "#ffc33b",
)  # fmt: skip
ROUNDS = (None, 255, 0)  # from the 13th expert on the colours repeat, mixed half with white, then half with black

FULL_QUANTILE = 0.98  # quantile of the margins from which on patches are drawn with full opacity
FAINTEST = 0.3  # fraction of the opacity that a margin of zero is drawn with

_MIN_SIDE = 512  # pixels of a panel's shorter side; smaller images are enlarged to keep the legend readable
_PAPER, _INK, _BLANK = (255, 255, 255), (25, 25, 25), (96, 96, 96)


def expert_colour(expert: int) -> Colour:
    base = EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]
    mix = ROUNDS[expert // len(EXPERT_COLOURS) % len(ROUNDS)]
    rgb = [int(base[at : at + 2], 16) for at in (1, 3, 5)]
    red, green, blue = rgb if mix is None else [math.floor((value + mix) / 2 + 0.5) for value in rgb]
    return red, green, blue


@dataclass(slots=True, kw_only=True)
class Panel:
    """One map. `best_hw` (uint8) and `margin_hw` (0 to 1) are None if the layer did not run."""

    title: str
    grid: tuple[int, int]
    best_hw: Array | None
    margin_hw: Array | None
    image_HW3: Array | None  # values from 0 to 1


def _full_margin(panels: Sequence[Panel]) -> float:
    """Return the margin that is drawn with full opacity. Routers are seldom sure, so with 1 most maps would be faint."""
    margins = [panel.margin_hw.reshape(-1) for panel in panels if panel.margin_hw is not None]
    return max(float(np.quantile(np.concatenate(margins), FULL_QUANTILE)), 1 / 255) if margins else 1.0


def draw_panels(panels: Sequence[Panel], experts: int, opacity: float, *, labels: bool, legend: bool) -> Array:
    """Return float32 [H, W, 3] from 0 to 1: the panels side by side, of one height, and a legend of all experts."""
    full = _full_margin(panels)
    pictures = [_paint(panel, opacity, full, labels) for panel in panels]
    height = max(picture.height for picture in pictures)
    pictures = [_to_height(picture, height) for picture in pictures]
    gap = 16 if len(pictures) > 1 else 0
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    below = _legend(panels, pictures, experts, full, width, gap) if legend else None
    drawing = Image.new("RGB", (width, height + (below.height if below else 0)), _PAPER)
    x = 0
    for picture in pictures:
        drawing.paste(picture, (x, 0))
        x += picture.width + gap
    if below:
        drawing.paste(below, (0, height))
    return np.asarray(drawing, np.float32) / 255


def _paint(panel: Panel, opacity: float, full: float, labels: bool) -> Image.Image:
    height, width = panel.grid
    if panel.image_HW3 is None:
        picture = Image.new("RGB", (width * PATCH_PIXELS, height * PATCH_PIXELS), _BLANK)
    else:
        picture = Image.fromarray((np.clip(panel.image_HW3, 0, 1) * 255 + 0.5).astype(np.uint8))
    factor = math.ceil(_MIN_SIDE / min(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    if panel.best_hw is None or panel.margin_hw is None:
        return picture
    colours = np.array([expert_colour(expert) for expert in range(NO_EXPERT)] + [_BLANK], np.uint8)
    strength = FAINTEST + (1 - FAINTEST) * np.clip(panel.margin_hw / full, 0, 1)
    alpha = strength * opacity * (panel.best_hw != NO_EXPERT)
    overlay = np.dstack([colours[panel.best_hw], (alpha * 255 + 0.5).astype(np.uint8)])
    cover = Image.fromarray(overlay, "RGBA").resize(picture.size, Image.Resampling.NEAREST)
    picture.paste(cover, mask=cover.getchannel("A"))
    if labels:
        _label(picture, panel.best_hw)
    return picture


def _label(picture: Image.Image, best_hw: Array) -> None:
    """Write each expert's number into its regions, where they have room, at the place farthest from the edge."""
    cell = (picture.width / best_hw.shape[1], picture.height / best_hw.shape[0])
    size = max(12, min(picture.size) // 36)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    room = 0.6 * size / min(cell)  # in patches, from the centre of the number
    for expert in np.unique(best_hw[best_hw != NO_EXPERT]):
        # The padding makes the image's edge an edge of the region.
        depth = ndimage.distance_transform_edt(np.pad(best_hw == expert, 1))[1:-1, 1:-1]
        regions, count = ndimage.label(best_hw == expert)
        for y, x in ndimage.maximum_position(depth, regions, range(1, count + 1)):
            if depth[y, x] < max(1.0, room):
                continue
            centre = ((x + 0.5) * cell[0], (y + 0.5) * cell[1])
            pen.text(centre, str(expert), _PAPER, font, anchor="mm", stroke_width=max(1, size // 8), stroke_fill=_INK)


def _to_height(picture: Image.Image, height: int) -> Image.Image:
    if picture.height == height:
        return picture
    width = round(picture.width * height / picture.height)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _legend(
    panels: Sequence[Panel], pictures: Sequence[Image.Image], experts: int, full: float, width: int, gap: int
) -> Image.Image:
    """Draw each panel's title, then for every expert a swatch, its number and its share of the patches."""
    size = max(13, min(pictures[0].size) // 40)
    font, line, margin = ImageFont.load_default(size), round(1.6 * size), size // 2
    shares = [_shares(panel, experts) for panel in panels]
    texts = [f"{expert}  " + " | ".join(f"{share[expert]:.0%}" for share in shares) for expert in range(experts)]
    swatch = line - size // 3
    # Room for the widest possible shares, so that the legends of all images of a batch have one height.
    widest = f"{max(experts - 1, 0)}  " + " | ".join(["100%"] * len(panels))
    column = round(font.getlength(widest) + swatch + 2.5 * size)
    columns = max(1, (width - 2 * margin) // column)
    rows = -(-experts // columns)
    legend = Image.new("RGB", (width, line * (rows + 2) + 2 * margin), _PAPER)
    pen, x = ImageDraw.Draw(legend), 0
    for panel, picture in zip(panels, pictures, strict=True):
        pen.text(
            (x + margin, margin + line / 2),
            panel.title,
            _INK,
            _fitting(panel.title, picture.width - size, size),
            anchor="lm",
        )
        x += picture.width + gap
    for expert, text in enumerate(texts):
        left, top = margin + expert % columns * column, margin + (1 + expert // columns) * line
        pen.rectangle((left, top + 2, left + swatch, top + line - 3), expert_colour(expert), _INK)
        pen.text((left + swatch + size // 2, top + line / 2), text, _INK, font, anchor="lm")
    note = f"Hue and number: best expert. Full colour: ahead of the second by {full:.2f} or more."
    note_font = _fitting(note, width - size, size)
    pen.text((margin, margin + (rows + 1.5) * line), note, _INK, note_font, anchor="lm")
    return legend


def _fitting(text: str, width: float, size: int) -> Any:
    """Return the font, smaller if the text does not fit into the width."""
    needed = ImageFont.load_default(size).getlength(text)
    return ImageFont.load_default(max(8, math.floor(size * min(1.0, width / needed))))


def _shares(panel: Panel, experts: int) -> Array:
    """Return the share of patches for which each expert is the best."""
    if panel.best_hw is None:
        return np.zeros(experts)
    counts = np.bincount(panel.best_hw.reshape(-1), minlength=NO_EXPERT + 1)
    return counts[:experts] / panel.best_hw.size

"""Recipe step 1: choose distinct Noto Color Emoji and write demo/assets/sprites.webp (an RGBA atlas) and objects.json.

Needs the font file (Debian and Ubuntu: package `fonts-noto-color-emoji`); all later steps need only the atlas.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_STRIKE = 109  # pixels: the only bitmap size in the font
OBJECTS = 300
CELL = 96  # pixels of a sprite in the atlas
COLUMNS = 20

# Unicode ranges whose emoji are things: weather, plants, food, celebration, sport, animals, objects, transport.
RANGES = [
    (0x1F308, 0x1F320), (0x1F32D, 0x1F37F), (0x1F380, 0x1F393), (0x1F396, 0x1F3C6), (0x1F3D0, 0x1F3D3),
    (0x1F3E0, 0x1F3F0), (0x1F3F8, 0x1F43F), (0x1F451, 0x1F462), (0x1F488, 0x1F488), (0x1F48D, 0x1F490),
    (0x1F4A1, 0x1F4A3), (0x1F4B0, 0x1F4BF), (0x1F4C0, 0x1F4E8), (0x1F4F7, 0x1F4FD), (0x1F511, 0x1F517),
    (0x1F525, 0x1F531), (0x1F56F, 0x1F579), (0x1F680, 0x1F6A4), (0x1F6AA, 0x1F6C1), (0x1F6CB, 0x1F6F8),
    (0x1F940, 0x1F96F), (0x1F97E, 0x1F9AE), (0x1F9BA, 0x1F9CB), (0x1F9E0, 0x1F9FF), (0x1FA70, 0x1FAAF),
    (0x2600, 0x2615), (0x26BD, 0x26C5), (0x26F2, 0x26FD), (0x2693, 0x2699), (0x2708, 0x2709),
]  # fmt: skip
# Signs rather than things, or names that do not say what the emoji shows.
LEFT_OUT = (
    "SIGN", "SYMBOL", "TROPHY AND", "NO ", "DO NOT", "PEDESTRIAN", "POTABLE", "RESTROOM", "PASSPORT", "CUSTOMS",
    "BAGGAGE", "LEFT LUGGAGE", "MENS", "WOMENS", "BABY", "SHOWER", "CHILDREN", "PAW PRINTS", "HEAVY", "PUT LITTER",
    "VERTICAL TRAFFIC", "WATER CLOSET", "INPUT", "KEYCAP", "BANKNOTE", "CHART", "CURRENCY", "MAIL", "MAILBOX",
    "ENVELOPE", "BOOKMARK TABS", "NAME BADGE", "PEOPLE", "PERSON", "SUIT", "CLOCK", "FACE WITH", "BOX TRAY",
    "VICTORY", "ELECTRIC PLUG", "INCOMING", "WHITE SUN", "MOON WITH", "LINK", "LOCK WITH", "CONVERT", "ATM",
    "BRIEFCASE", "MEMO", "PAGE", "LEDGER", "CARD", "FOLDER", "CALENDAR", "GLOBE", "BANK", "DEPARTMENT", "LOVE HOTEL",
    "HOTEL", "POST OFFICE", "HOUSE WITH", "SANTA", "TAXI", "ONCOMING", "POINT OF", "STAR OF", "CROSS", "WHEEL OF",
    "YIN", "PEACE", "AIRPLANE ARRIVING", "AIRPLANE DEPARTURE",
)  # fmt: skip
WORDS_LEFT_OUT = {
    "face",
    "with",
    "of",
    "and",
    "the",
    "symbol",
    "fruit",
    "black",
    "white",
    "blue",
    "green",
    "red",
    "orange",
}


def caption_name(character: str) -> str:
    """Shorten a character's Unicode name: 'HOT BEVERAGE' -> 'hot beverage'. Colour words are left to the backgrounds."""
    words = unicodedata.name(character).lower().replace("-", " ").split()
    return " ".join(word for word in words if word not in WORDS_LEFT_OUT)


def candidates(font: ImageFont.FreeTypeFont) -> list[tuple[str, Image.Image]]:
    """Return name and square RGBA sprite (CELL pixels) of every emoji in RANGES that the font draws in colour."""
    sprites: dict[str, Image.Image] = {}
    for first, last in RANGES:
        for code in range(first, last + 1):
            character = chr(code)
            name = unicodedata.name(character, "")
            if not name or any(word in name for word in LEFT_OUT):
                continue
            canvas = Image.new("RGBA", (136, 136))
            ImageDraw.Draw(canvas).text((0, 4), character, font=font, embedded_color=True)
            box = canvas.getbbox()
            if box is None or np.asarray(canvas)[..., 3].mean() < 16:
                continue
            sprite = canvas.crop(box)
            side = max(sprite.size)
            square = Image.new("RGBA", (side, side))
            square.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
            premultiplied = square.convert("RGBa").resize((CELL, CELL), Image.Resampling.LANCZOS)
            caption = caption_name(character)
            if caption and len(caption.split()) <= 3:
                sprites.setdefault(caption, premultiplied.convert("RGBA"))
    return list(sprites.items())


def most_distinct(sprites: list[tuple[str, Image.Image]], count: int) -> list[int]:
    """Return indices of `count` sprites: one of the most similar pair (at 24 pixels) is dropped again and again."""
    small = np.stack([np.asarray(s.convert("RGBa").resize((24, 24)), dtype=np.float32).ravel() for _, s in sprites])
    squared = (small**2).sum(1)
    distance = squared[:, None] + squared[None] - 2 * small @ small.T
    np.fill_diagonal(distance, np.inf)
    kept = np.ones(len(sprites), dtype=bool)
    while kept.sum() > count:
        first, second = np.unravel_index(np.argmin(distance), distance.shape)
        nearest_first = np.partition(distance[first], 1)[1]
        nearest_second = np.partition(distance[second], 1)[1]
        drop = first if nearest_first < nearest_second else second
        kept[drop] = False
        distance[drop, :] = np.inf
        distance[:, drop] = np.inf
    return list(np.flatnonzero(kept))


def write_atlas(font_file: Path, out: Path) -> None:
    """Write sprites.webp (COLUMNS cells a row) and objects.json (names in atlas order) into `out`."""
    sprites = candidates(ImageFont.truetype(str(font_file), FONT_STRIKE))
    if len(sprites) < OBJECTS:
        raise ValueError(
            f"{font_file} draws {len(sprites)} of the wanted emoji in colour; {OBJECTS} are needed. Use Noto Color Emoji."
        )
    chosen = [sprites[i] for i in most_distinct(sprites, OBJECTS)]
    atlas = Image.new("RGBA", (COLUMNS * CELL, OBJECTS // COLUMNS * CELL))
    for index, (_, sprite) in enumerate(chosen):
        atlas.paste(sprite, (index % COLUMNS * CELL, index // COLUMNS * CELL))
    atlas.save(out / "sprites.webp", quality=90, alpha_quality=100, method=6)
    (out / "objects.json").write_text(json.dumps([name for name, _ in chosen], indent=0) + "\n")
    print(f"{len(sprites)} candidates, {OBJECTS} kept, {(out / 'sprites.webp').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    arguments = parser.parse_args()
    write_atlas(arguments.font, arguments.out)

"""Prompts to sample (of the emoji dataset, of GenEval, or a list), and their encoders; options of both."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m_model.config import PATCH_PIXELS

from .. import UserError
from ..data.batch import Batch, prompt_batch, tokens_to_latents
from ..data.emoji import EMOJI_SHIFT, EmojiAutoencoder, EmojiTextEncoders, picture_metadata, prompt_pictures
from ..data.encoders import FluxAutoencoder, FluxTextEncoders, ImageAutoencoder, TextEncoders
from ..data.prompts import read_prompt_lines
from ..data.samples import describe_left_out

log = logging.getLogger(__name__)

_EMOJI_SIZE = 128


@dataclass(kw_only=True, slots=True, frozen=True)
class Prompt:
    """A prompt. `index` is its line, or its number among the emoji prompts; `metadata` is written beside its images."""

    index: int
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    picture: Any = None  # demo.dataset.Picture that an emoji prompt describes


def read_prompts(data: str, every: int = 1) -> list[Prompt]:
    """Read prompts, or every n-th of them.

    `data` is `emoji` for the demo's 500 fixed prompts, a .jsonl with an object with `prompt` on each line, as GenEval's
    evaluation_metadata, or another file with a prompt on each line. Lines without a prompt are left out, and counted in
    the log. Raises UserError for a file that cannot be read or has no prompts.
    """
    if data == "emoji":
        return [_emoji_prompt(index, picture) for index, picture in enumerate(prompt_pictures())][::every]
    path = Path(data)
    entries, left_out = read_prompt_lines(path)
    if not entries:
        raise UserError(
            f"{path}: has no prompts; expected emoji, or a file with one per line. Found {describe_left_out(left_out)}."
        )
    if left_out:
        log.warning("%s: left out %s.", path, describe_left_out(left_out))
    return [Prompt(index=place, text=entry["prompt"], metadata=entry) for place, entry in entries][::every]


def _emoji_prompt(index: int, picture: Any) -> Prompt:
    return Prompt(index=index, text=picture.caption(), metadata=picture_metadata(picture), picture=picture)


@dataclass(kw_only=True, slots=True)
class Encoders:
    """Text encoders and autoencoder of an evaluation. `size`: width and height in pixels."""

    texts: TextEncoders
    autoencoder: ImageAutoencoder
    size: tuple[int, int]

    @torch.no_grad()
    def batch(self, prompts: Sequence[str], guidance: float) -> Batch:
        return prompt_batch(self.texts.encode(prompts), torch.full((len(prompts),), guidance), self.size)

    @torch.no_grad()
    def images(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor:
        """Decode to images [B, 3, height, width] in 0..1."""
        return self.autoencoder.decode(tokens_to_latents(tokens_BTC, image_ids_T3))


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that read_prompts and open_encoders read."""
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--data", required=True, metavar="emoji|PROMPTS",
        help="the demo's 500 prompts; GenEval's evaluation_metadata.jsonl; or a file with a prompt per line",
    )  # fmt: skip
    prompts.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th prompt")
    prompts.add_argument(
        "--text-encoders", metavar="P", help="a diffusers FLUX pipeline, or emoji (default with --data emoji)"
    )
    prompts.add_argument("--vae", metavar="P", help="the same or another pipeline, or emoji (default: --text-encoders)")
    prompts.add_argument("--text-tokens", type=int, default=512, help="T5's sequence length (default: 512)")
    prompts.add_argument(
        "--encoder-device", metavar="D", help="device of text encoders and autoencoder (default: --device)"
    )
    prompts.add_argument(
        "--size", metavar="WxH", help="width and height in pixels (default: 1024x1024; emoji: 128x128)"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    sampling.add_argument("--guidance", type=float, default=3.5, help="guidance scale (default: 3.5)")
    sampling.add_argument(
        "--shift", type=float, metavar="MU",
        help="time shift (default: FLUX's, by size; 0 for a file without guidance, such as schnell; emoji: 1.15)",
    )  # fmt: skip
    sampling.add_argument("--seed", type=int, default=0, help="seed of prompt 0; prompt i has seed + i (default: 0)")
    sampling.add_argument("--batch", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    sampling.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model (default: bfloat16, on a CPU float32)"
    )
    sampling.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    on_cpu = torch.device(args.device).type == "cpu"
    dtype: torch.dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    return dtype


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError unless each of these options is 1 or more."""
    for name in names:
        value = getattr(args, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")


def open_encoders(args: argparse.Namespace) -> Encoders:
    """Open the encoders. Raises UserError if none are named, or they are missing."""
    texts = args.text_encoders or ("emoji" if args.data == "emoji" else None)
    vae = args.vae or texts
    if texts is None or vae is None:
        raise UserError(f"--data {args.data} needs --text-encoders, a diffusers FLUX pipeline (or emoji, the demo's).")
    dtype, device = model_dtype(args), args.encoder_device or args.device
    return Encoders(
        texts=EmojiTextEncoders() if texts == "emoji" else FluxTextEncoders(texts, args.text_tokens, dtype, device),
        autoencoder=EmojiAutoencoder() if vae == "emoji" else FluxAutoencoder(vae, dtype, device),
        size=_size(args.size, _EMOJI_SIZE if vae == "emoji" else 1024),
    )


def _size(text: str | None, default: int) -> tuple[int, int]:
    width, cross, height = (text or f"{default}x{default}").partition("x")
    if not (cross and width.isdigit() and height.isdigit()) or int(width) % PATCH_PIXELS or int(height) % PATCH_PIXELS:
        raise UserError(f"--size is {text}; expected WIDTHxHEIGHT, multiples of {PATCH_PIXELS}, such as 1024x768.")
    if not int(width) * int(height):
        raise UserError(f"--size is {text}; expected {PATCH_PIXELS} or more each way.")
    return int(width), int(height)


def sampling_shift(args: argparse.Namespace, encoders: Encoders, guided: bool) -> float:
    """Return mu: as given, or as the model was made for."""
    from ..flow.noise import time_shift
    from ..run_config import TimestepsSection

    if args.shift is not None:
        return float(args.shift)
    if isinstance(encoders.autoencoder, EmojiAutoencoder):
        return EMOJI_SHIFT
    tokens = encoders.size[0] * encoders.size[1] // PATCH_PIXELS**2
    return time_shift(tokens, TimestepsSection()) if guided else 0.0

"""Source of prompts without images: the teacher makes the images, along its own trajectories."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d2m_model.foreign import read_json

from .. import UserError
from ..text_file import read_text
from .batch import GUIDANCE, Batch, Progress, Texts, draw_guidance, prompt_batch
from .encoded import Encoded
from .held_out import choose_held_out, split_text
from .order import sample_order
from .samples import LeftOut, describe_left_out
from .store import content_key

log = logging.getLogger(__name__)

_FILE_FORMAT = 'a .txt of prompts, one a line, or a .jsonl of objects with "prompt"'
_NO_PROMPT = "line without a prompt"


class PromptSource:
    """Prompts of a file. Images are squares; each batch draws one of the resolutions."""

    def __init__(
        self,
        path: Path,
        encoded: Encoded,
        *,
        resolutions: Sequence[int],
        guidance: tuple[float, float] = GUIDANCE,
        held_out: float = 0.0,
    ) -> None:
        """`held_out`: share of the prompts that are held out. Raises UserError if there are no prompts."""
        self.name, self.encoded = path.name, encoded
        self.resolutions, self.guidance = tuple(resolutions), guidance
        self.prompts, self.left_out = _read(path)
        if not self.prompts:
            raise UserError(f"{path}: no prompts; expected {_FILE_FORMAT}. Found {describe_left_out(self.left_out)}.")
        if self.left_out:
            log.warning("%s: left out %s.", self.name, describe_left_out(self.left_out))
        self._prepared = False
        chosen = choose_held_out(self.prompts, held_out)
        self._sides = {
            side: [prompt for prompt, other in zip(self.prompts, chosen, strict=True) if other == side]
            for side in (False, True)
        }
        self.identity = content_key(self.resolutions, encoded.identity, held_out, *self.prompts)

    def prepare(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
        """Encode the missing part of this rank's share of the prompts."""
        share = self.prompts[rank::world]
        try:
            for done, prompt in enumerate(share, start=1):
                if not self.encoded.has_text(prompt):
                    self.encoded.texts([prompt])
                if progress is not None:
                    progress(done, len(share))
        finally:
            self.encoded.release()
        self._prepared = True

    def split_text(self) -> str:
        return split_text(len(self.prompts), len(self._sides[True]))

    def batch(self, index: int, size: int, seed: int, *, held_out: bool = False) -> Batch:
        """Return prompts in random order, a new one for each pass over the file. There are no images."""
        if not self._prepared:
            self.prepare()
        prompts = self._sides[held_out] or self.prompts
        chosen = [prompts[place] for place in sample_order(len(prompts), index * size, size, (seed,))]
        side = int(np.random.default_rng((seed, index, 2)).choice(self.resolutions))
        guidance_B = draw_guidance(self.guidance, index, size, seed)
        batch = prompt_batch(self.encode_prompts(chosen), guidance_B, (side, side))
        batch.captions = tuple(chosen)
        return batch

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """Decode to images [B, 3, P, P] in 0..1; None without an autoencoder."""
        return self.encoded.decode(tokens_BTC, image_ids_T3)

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        """Read encoded prompts from the store, or make and keep them."""
        return self.encoded.encode_prompts(prompts)


def _read(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the prompts, and the numbers of lines without one."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: expected {_FILE_FORMAT}.")
    entries, left_out = read_prompt_lines(path)
    return [entry["prompt"] for _, entry in entries], left_out


def read_prompt_lines(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], LeftOut]:
    """Return (place, object with `prompt`) for each line, and the numbers of lines without one.

    Empty lines are skipped; places count the others from 0.

    In a .jsonl a line is such an object, in any other file it is the prompt. Raises UserError for a file that cannot be
    read.
    """
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    entries, bad = [], []
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for place, (number, line) in enumerate(filled):
        entry = _json_entry(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
        if entry is None:
            bad.append(f"line {number}")
        else:
            entries.append((place, entry))
    return entries, {_NO_PROMPT: bad} if bad else {}


def _json_entry(line: str) -> dict[str, Any] | None:
    try:
        entry = read_json(line)
    except ValueError:
        return None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    return {**entry, "prompt": prompt.strip()} if isinstance(prompt, str) and prompt.strip() else None

"""Source of prompts without images: the teacher makes the images, along its own trajectories."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .. import UserError
from .batch import GUIDANCE, Batch, Progress, Texts, draw_guidance, prompt_batch
from .encoded import Encoded
from .held_out import choose_held_out, split_text
from .order import sample_order
from .samples import describe_left_out
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
        return prompt_batch(self.encode_prompts(chosen), draw_guidance(self.guidance, index, size, seed), (side, side))

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """Decode to images [B, 3, P, P] in 0..1; None without an autoencoder."""
        return self.encoded.decode(tokens_BTC, image_ids_T3)

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        """Read encoded prompts from the store, or make and keep them."""
        return self.encoded.encode_prompts(prompts)


def _read(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the prompts, and the numbers of lines without one; empty lines are skipped."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: expected {_FILE_FORMAT}.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    prompts, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = line.strip() if path.suffix == ".txt" else _json_prompt(line)
        if prompt:
            prompts.append(prompt)
        else:
            bad.append(f"line {number}")
    return prompts, {_NO_PROMPT: bad} if bad else {}


def _json_prompt(line: str) -> str | None:
    try:
        prompt = json.loads(line)["prompt"]
        return prompt.strip() if isinstance(prompt, str) else None
    except (ValueError, KeyError, TypeError):
        return None

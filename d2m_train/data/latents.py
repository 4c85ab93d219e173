"""Source that reads a file of precomputed latents and text features, so that no encoders are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from d2m_model.tensor_file import TensorFile

from .. import UserError
from ..fingerprint import fingerprint
from .batch import GUIDANCE, Batch, Progress, Texts, draw_guidance, latent_batch
from .encoded import Encoded
from .encoders import no_text_encoders
from .held_out import choose_held_out, split_text
from .order import sample_order

LATENTS_FORMAT = (
    "a .safetensors with `latents` [N, channels, height, width] in FLUX's model space ((latent - 0.1159) * 0.3611), "
    "`context` [N, text tokens, width], `pooled` [N, width], and optionally `guidance` [N] and `text_tokens` [N] (how many "
    "of the text tokens are not padding)"
)


class LatentFile:
    """Precomputed latents and text features. `encoded`, if given, is only used by `decode` and `encode_prompts`."""

    def __init__(
        self,
        path: Path,
        *,
        guidance: tuple[float, float] = GUIDANCE,
        encoded: Encoded | None = None,
        held_out: float = 0.0,
    ) -> None:
        """`held_out`: share of the samples that are held out."""
        self.name = path.name
        self.guidance, self.encoded = guidance, encoded
        self.file = TensorFile(path)
        self.identity = fingerprint([path])
        shapes = self.file.shapes
        axes = {"latents": 4, "context": 3, "pooled": 2} | {
            name: 1 for name in ("guidance", "text_tokens") if name in shapes
        }
        for name, count in axes.items():
            found = shapes.get(name)
            if found is None or len(found) != count or found[0] != shapes["latents"][0]:
                raise UserError(f"{path}: {name} is {found and list(found)}; expected {LATENTS_FORMAT}.")
        if shapes["latents"][2] % 2 or shapes["latents"][3] % 2 or shapes["latents"][0] == 0:
            raise UserError(f"{path}: latents is {list(shapes['latents'])}; expected samples of even height and width.")
        self.identity += f", {held_out} held out" if held_out else ""
        self._sides = self._split(held_out)

    def _split(self, share: float) -> dict[bool, list[int]]:
        """Return the samples that are held out, and the others. Rows of their latents tell contents apart."""
        latents = self.file.tensor("latents")
        channel, row = latents.shape[1] // 2, latents.shape[2] // 2
        contents = [""] * len(latents)
        if share:
            contents = [
                hashlib.sha256(sample[[0, channel], row].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                for sample in latents
            ]
        chosen = choose_held_out(contents, share)
        return {side: [place for place, other in enumerate(chosen) if other == side] for side in (False, True)}

    def prepare(self, rank: int = 0, world: int = 1, progress: Progress | None = None) -> None:
        """Does nothing: everything is precomputed."""

    def split_text(self) -> str:
        return split_text(sum(map(len, self._sides.values())), len(self._sides[True]))

    def batch(self, index: int, size: int, seed: int, *, held_out: bool = False) -> Batch:
        """Return samples in random order, a new one for each pass over the file."""
        tensors = {name: self.file.tensor(name) for name in self.file.shapes}
        places = self._sides[held_out] or self._sides[False]
        chosen = torch.tensor([places[number] for number in sample_order(len(places), index * size, size, (seed,))])
        context = tensors["context"][chosen]
        guidance = draw_guidance(self.guidance, index, size, seed)
        if "guidance" in tensors:
            guidance = tensors["guidance"][chosen]
        words_BL = None
        if "text_tokens" in tensors:
            words_BL = torch.arange(context.shape[1]) < tensors["text_tokens"][chosen, None]
        return latent_batch(tensors["latents"][chosen], context, tensors["pooled"][chosen], guidance, words_BL)

    def decode(self, tokens_BTC: Tensor, image_ids_T3: Tensor) -> Tensor | None:
        """Decode to images [B, 3, P, P] in 0..1; None without an autoencoder."""
        return None if self.encoded is None else self.encoded.decode(tokens_BTC, image_ids_T3)

    def encode_prompts(self, prompts: Sequence[str]) -> Texts:
        """Encode prompts. Raises UserError without text encoders."""
        if self.encoded is None:
            raise no_text_encoders()
        return self.encoded.encode_prompts(prompts)

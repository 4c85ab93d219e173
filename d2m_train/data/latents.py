"""A file of precomputed latents and text features as a source: a real FLUX without its text encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from d2m_model.tensor_file import TensorFile

from .. import UserError
from .batch import GUIDANCE, Batch, batch_of

FILE_FORMAT = (
    "a .safetensors with `latents` [N, channels, height, width] in FLUX's model space ((latent - 0.1159) * 0.3611), "
    "`context` [N, text tokens, width], `pooled` [N, width], and optionally `guidance` [N] and `text_tokens` [N] (how many "
    "of the text tokens are not padding)"
)


class LatentFile:
    """Precomputed latents and text features, so that a real FLUX is calibrated without its text encoders."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.file = TensorFile(path)
        self.identity = f"{path.absolute()}, {self.file.size} bytes, modified {path.stat().st_mtime_ns}"
        shapes = self.file.shapes
        axes = {"latents": 4, "context": 3, "pooled": 2} | {
            name: 1 for name in ("guidance", "text_tokens") if name in shapes
        }
        for name, count in axes.items():
            found = shapes.get(name)
            if found is None or len(found) != count or found[0] != shapes["latents"][0]:
                raise UserError(f"{path}: {name} is {found and list(found)}; expected {FILE_FORMAT}.")
        if shapes["latents"][2] % 2 or shapes["latents"][3] % 2 or shapes["latents"][0] == 0:
            raise UserError(f"{path}: latents is {list(shapes['latents'])}; expected samples of even height and width.")

    def batch(self, index: int, size: int, seed: int) -> Batch:
        """The samples in random order, in another one when they run out."""
        tensors = {name: self.file.tensor(name) for name in self.file.shapes}
        samples = len(tensors["latents"])
        places = range(index * size, (index + 1) * size)
        orders = {
            turn: np.random.default_rng((seed, turn)).permutation(samples) for turn in {p // samples for p in places}
        }
        chosen = torch.tensor([orders[place // samples][place % samples] for place in places])
        context = tensors["context"][chosen]
        guidance = torch.from_numpy(np.random.default_rng((seed, index, 1)).uniform(*GUIDANCE, size))
        if "guidance" in tensors:
            guidance = tensors["guidance"][chosen]
        words_BL = None
        if "text_tokens" in tensors:
            words_BL = torch.arange(context.shape[1]) < tensors["text_tokens"][chosen, None]
        return batch_of(tensors["latents"][chosen], context, tensors["pooled"][chosen], guidance, words_BL)

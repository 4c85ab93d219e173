"""Recorder of one part of a calibration (see calibration.py). A host runs the dense model, and its hooks feed this.

Shapes: B batch, T tokens, H hidden size, N neurons, n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mob import mean_tokens
from .calibration import GUIDANCE

VECS_PER_SAMPLE = 64  # conditioning vectors per pooled text: other timesteps and guidances cost next to nothing


class Recorder:
    """Collects on the CPU what converting a dense FLUX needs to know of it.

    What is recorded twice under one name, at two evaluations of the model, is concatenated along the first axis.
    """

    def __init__(self, tokens: int, generator: torch.Generator) -> None:
        """`tokens`: tokens kept of an FFN's inputs and of a block's streams at each evaluation, drawn with `generator`."""
        self._tokens, self._generator = tokens, generator
        # Apart, so that what is kept of the FFNs does not depend on which blocks are recorded.
        self._stream_generator = torch.Generator().manual_seed(generator.initial_seed())
        self._recorded: dict[str, list[Tensor]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors, by the names of calibration.py."""
        return {name: torch.cat(tensors) for name, tensors in self._recorded.items()}

    def has(self, name: str) -> bool:
        return name in self._recorded

    def ffn_inputs(self, ffn: str, x_TH: Tensor) -> None:
        """Keep some of an FFN's inputs, drawn at random."""
        chosen = torch.randperm(len(x_TH), generator=self._generator)[: self._tokens]
        self._keep(f"inputs.{ffn}", x_TH[chosen.to(x_TH.device)])

    def block_inputs(self, block: str, streams_BTH: Sequence[Tensor], vec_BH: Tensor | None = None) -> None:
        """Keep what a block router would read: the mean of all tokens, and vec, the same for every block, if given."""
        self._keep(f"mean.{block}", mean_tokens(*streams_BTH))
        if vec_BH is not None:
            self._keep("vec", vec_BH.float())

    def block_change(self, block: str, before_BTH: Sequence[Tensor], after_BTH: Sequence[Tensor], image: slice) -> None:
        """Keep the mean squares of output - input, over all tokens and over the image's.

        `image`: the image's tokens where the streams are laid end to end.
        """
        changes = [(new - old).float().square().mean(2) for old, new in zip(before_BTH, after_BTH, strict=True)]
        change_BT = torch.cat(changes, 1)
        self._keep(f"change.{block}", torch.stack([change_BT.mean(1), change_BT[:, image].mean(1)], 1))

    def stream_change(self, block: str, stream: str, before_BTH: Tensor, after_BTH: Tensor) -> None:
        """Keep some tokens of a block's stream, as many of each sample, and how the block changes them, in bfloat16."""
        batch, length = before_BTH.shape[:2]
        chosen = torch.randperm(length, generator=self._stream_generator)[: -(-self._tokens // batch)].to(
            before_BTH.device
        )
        before_BnH, after_BnH = before_BTH[:, chosen], after_BTH[:, chosen]
        self._keep(f"tokens.{block}.{stream}", torch.full((batch,), len(chosen)))
        self._keep(f"before.{block}.{stream}", before_BnH.flatten(0, 1).bfloat16())
        self._keep(f"stream_change.{block}.{stream}", (after_BnH.float() - before_BnH.float()).flatten(0, 1).bfloat16())

    def silu_vecs(self, text_BX: Tensor, guided: bool, vec: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        """Keep silu(vec) [n, H] of pooled texts, or their embeddings, under other timesteps and guidances.

        `vec` computes vec from n texts, n timesteps in 0..1 and n guidances, which are None unless the model is `guided`.
        """
        text_nX = text_BX.repeat_interleave(VECS_PER_SAMPLE, 0)
        t_n = torch.rand(len(text_nX), generator=self._generator)
        guidance_n = None
        if guided:
            low, high = GUIDANCE
            guidance_n = low + (high - low) * torch.rand(len(text_nX), generator=self._generator)
        self._keep("silu_vec", F.silu(vec(text_nX, t_n, guidance_n).float()))

    def importance(self, scores: Mapping[str, Tensor]) -> None:
        """Keep the importance [N] of the neurons of each FFN."""
        for ffn, score_N in scores.items():
            self._keep(f"importance.{ffn}", score_N)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._recorded.setdefault(name, []).append(tensor.detach().to("cpu", copy=True))

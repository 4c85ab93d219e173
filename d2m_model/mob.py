"""Mixture of Blocks (Sec. 3.1, Eq. 4-5): of a group of consecutive blocks, each sample runs a few.

The choice is made once for each sample, ahead of the group's first block. At inference a block runs on the samples
that chose it and the others pass it by; in training every rank runs every block on every sample and masks, since ranks
that ran different blocks would wait for each other for ever in a sharded run.

Shapes: B batch, T tokens, H hidden size, M blocks of a group, S samples of a block, n observations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import Selection
from .routers.routing import float32_linear

_ALPHA = 0.5  # of Eq. 5: the weight of the tokens against that of the AdaLN vector
BLOCK_RIDGES = tuple(
    10.0**exponent for exponent in range(-4, 3)
)  # of the mean square of a feature; one of them is chosen

Value = TypeVar("Value")


# Routing


@dataclass(kw_only=True)  # no slots: DeepSpeed looks by vars() into what a module returns
class BlockRouting:
    """The choice of a block router: which blocks each sample runs, in their order. bool [B, M], float32 [B, M]."""

    chosen_BM: Tensor
    logits_BM: Tensor
    active: int

    @property
    def probabilities_BM(self) -> Tensor:
        """p, the softmax of the logits over the group's blocks, float32 [B, M]."""
        return self.logits_BM.softmax(dim=-1)


def mean_tokens(*streams_BTH: Tensor) -> Tensor:
    """The mean over the tokens of all streams together (image and text, or both in one), float32 [B, H]."""
    tokens = sum(stream.shape[1] for stream in streams_BTH)
    sums = [stream.sum(dim=1, dtype=torch.float32) for stream in streams_BTH]
    return torch.stack(sums).sum(dim=0) / tokens


def check_active(active: int, blocks: int) -> None:
    """Raises ValueError unless 0 <= active <= blocks."""
    if not 0 <= active <= blocks:
        raise ValueError(f"{active} blocks are to be active; expected 0 to {blocks}, the blocks of the group.")


def route_blocks(
    x_mean_BH: Tensor, vec_BH: Tensor, router_x_MH: Tensor, router_y_MH: Tensor, active: int, selection: Selection
) -> BlockRouting:
    """Eq. 5: `active` blocks by alpha W_x mean_tokens([x, c]) + (1 - alpha) W_y vec, in float32 whatever the dtypes.

    `topk` (Eq. 5): those with the highest logits; among equals the earlier block. `window` (Eq. 4): as many consecutive
    blocks, those whose logits have the highest sum (of equal windows the first): of all windows the one that topk
    itself, which has the highest sum of all choices, would take.
    Raises ValueError for an `active` outside 0 ... M.
    """
    blocks = router_x_MH.shape[0]
    check_active(active, blocks)
    logits_BM = _ALPHA * float32_linear(x_mean_BH, router_x_MH, None)
    logits_BM = logits_BM + (1 - _ALPHA) * float32_linear(vec_BH, router_y_MH, None)
    scores_BM = logits_BM.detach()
    if active == 0:
        chosen_BM = torch.zeros_like(scores_BM, dtype=torch.bool)
    elif selection == "window":
        first_B1 = scores_BM.unfold(1, active, 1).sum(dim=2).argmax(dim=1, keepdim=True)  # the first of equals
        block_M = torch.arange(blocks, device=scores_BM.device)
        chosen_BM = (block_M >= first_B1) & (block_M < first_B1 + active)
    else:
        # Stable, since torch.topk promises no order among ties.
        best_BK = scores_BM.sort(dim=1, descending=True, stable=True).indices[:, :active]
        chosen_BM = torch.zeros_like(scores_BM, dtype=torch.bool).scatter(1, best_BK, True)
    return BlockRouting(chosen_BM=chosen_BM, logits_BM=logits_BM, active=active)


# Inference: each block on its samples


@dataclass(kw_only=True, slots=True, frozen=True)
class SampleSubset:
    """Which of a batch's samples a block runs on. `index_S` is None where it is all of them, or none."""

    batch: int
    count: int
    index_S: Tensor | None

    @classmethod
    def of(cls, indices: Sequence[int], batch: int, device: torch.device) -> SampleSubset:
        some = 0 < len(indices) < batch
        return cls(batch=batch, count=len(indices), index_S=torch.tensor(indices, device=device) if some else None)


def samples_per_block(routing: BlockRouting) -> list[SampleSubset]:
    """Of every block of the group, in order, the samples that chose it.

    Here the host waits for the device, once for a group, since it cannot leave out a block that it does not know of.
    It does not wait where no block can be left out, or all are (active 0 or M). A compiled graph breaks here; one that
    must not (torch.compile with fullgraph, a CUDA graph) runs every block and takes `masked`.
    """
    batch, blocks = routing.chosen_BM.shape
    device = routing.chosen_BM.device
    if routing.active in (0, blocks):
        everyone = range(batch if routing.active else 0)
        return [SampleSubset.of(everyone, batch, device)] * blocks
    chosen = routing.chosen_BM.T.tolist()
    return [SampleSubset.of([b for b, runs in enumerate(row) if runs], batch, device) for row in chosen]


def select_samples(value: Value, samples: SampleSubset) -> Value:
    """Of a tensor that has one entry for each sample (its first dimension is the batch's size), those of `samples`.

    What all samples share stays as it is: tensors with another first dimension (1, as a rule), and whatever is
    no tensor. Goes into tuples, lists and the values of dicts. Where `samples` are all of the batch, nothing is copied.
    """
    if samples.index_S is None:
        return value
    found: Any = value
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == samples.batch:
            found = value.index_select(0, samples.index_S)
    elif isinstance(value, dict):
        found = {key: select_samples(item, samples) for key, item in value.items()}
    elif isinstance(value, tuple | list):
        items = [select_samples(item, samples) for item in value]
        found = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return found


def scatter_samples(stream_BTH: Tensor, found_STH: Tensor, samples: SampleSubset) -> Tensor:
    """stream_BTH with the rows of `samples` replaced by found_STH; a new tensor unless they are all of the batch."""
    return found_STH if samples.index_S is None else stream_BTH.index_copy(0, samples.index_S, found_STH)


def run_on(
    samples: SampleSubset, block: Callable[..., tuple[Tensor, ...]], streams: tuple[Tensor, ...], **conditions: Any
) -> tuple[Tensor, ...]:
    """block(*streams, **conditions), run on `samples` alone; the streams [B, T, H] of the others are returned as given.

    `block` returns as many streams as it takes. Each condition (vec, pe, mask, ...) is seen through `select_samples`.
    """
    if samples.count == 0:
        return streams
    found = block(*select_samples(streams, samples), **select_samples(conditions, samples))
    return tuple(scatter_samples(stream, new, samples) for stream, new in zip(streams, found, strict=True))


# Training: every block on every sample


def masked(routing: BlockRouting, block: int, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a block's inputs x and outputs y (streams [B, T, H]): x + (1 + p - sg(p)) (y - x) where it is chosen, else x.

    That is y, exactly, with a gradient by which the router learns: a chosen block's p grows where more of y - x would
    have helped. `block` counts from the group's first. It was run on every sample, on every rank.
    """
    chosen_B11 = routing.chosen_BM[:, block, None, None]
    p_B11 = routing.probabilities_BM[:, block, None, None]
    nothing_B11 = p_B11 - p_B11.detach()
    out = []
    for before, after in zip(x, y, strict=True):
        kept = torch.where(chosen_B11, after, before)
        if nothing_B11.requires_grad:
            # Added to `kept` instead of factored into it, so that no rounding of x + (y - x) is left.
            kept = kept + nothing_B11.to(kept.dtype) * (kept - before)
        out.append(kept)
    return tuple(out)


def choice_fractions(routing: BlockRouting) -> Tensor:
    """float32 [M]: the part of the samples that chose each block. Mean it over ranks (and accumulated microbatches, if
    they are at hand) for `block_balance_loss`."""
    return routing.chosen_BM.float().mean(dim=0)


def block_balance_loss(routing: BlockRouting, fractions_M: Tensor) -> Tensor:
    """GShard's balance loss of a block router: M / active sum_i fraction_i mean_b p_bi; 1 where both are uniform.

    `fractions_M` are `choice_fractions` over the global batch. Of p the mean is over this rank's samples, so that the
    gradients, which are averaged over ranks, come out as the global batch's. Zero if no block is active.
    """
    blocks = routing.logits_BM.shape[1]
    loss = blocks / max(1, routing.active) * (fractions_M.detach() * routing.probabilities_BM.mean(dim=0)).sum()
    return loss if routing.active else 0 * loss


# Initialisation


@dataclass(kw_only=True, slots=True, frozen=True)
class BlockRouters:
    """W_x and W_y of one group, float32 [M, H]."""

    x_MH: Tensor
    y_MH: Tensor


def random_block_routers(blocks: int, hidden_size: int, generator: torch.Generator) -> BlockRouters:
    """The paper's: normal, never zero (ties would send every sample to the same blocks)."""
    x_MH, y_MH = torch.randn(2, blocks, hidden_size, generator=generator) * hidden_size**-0.5
    return BlockRouters(x_MH=x_MH, y_MH=y_MH)


@torch.no_grad()
def ridge_block_routers(x_mean_nH: Tensor, vec_nH: Tensor, change_nM: Tensor) -> BlockRouters:
    """Block routers without training: ridge regression of how much each block changes its input on what is routed by.

    Observations are samples of timesteps and prompts, taken ahead of the group's first block; change_nM is, say, the
    norm of B(x) - x. Only how blocks differ decides a choice, so what they have in common is taken off each observation.
    Routers have no bias: the regression goes through the origin, and the constant part of a preference is carried by
    what the features have in common, which is much (of vec above all). With fewer observations than features as a rule,
    the ridge is the one of BLOCK_RIDGES with the least leave-one-out error.

    Scaled so that alpha and 1 - alpha of Eq. 5 cancel and logits vary by 1 over samples and blocks.
    Raises ValueError with fewer than two observations, or if no block differs from another: there is nothing to learn.
    """
    if len(change_nM) < 2:
        raise ValueError(f"There are {len(change_nM)} observations of the blocks; expected 2 or more.")
    change_nM = change_nM.double() - change_nM.double().mean(dim=1, keepdim=True)
    if change_nM.abs().max() == 0:
        raise ValueError("All blocks of the group change their input alike; expected blocks to choose between.")
    sizes_H = [_sizes(x_mean_nH), _sizes(vec_nH)]  # apart: those of tokens may be a thousand times those of vec
    size_I = torch.cat(sizes_H)
    features_nI = torch.cat([x_mean_nH, vec_nH], dim=1).double() / size_I
    # (F^T F + r)^-1 F^T y = F^T (F F^T + r)^-1 y: of the two, the n x n system.
    eigenvalues_n, vectors_nn = torch.linalg.eigh(features_nI @ features_nI.T)
    unit = eigenvalues_n.clamp_min(0).mean()
    best = None
    for ridge in BLOCK_RIDGES:
        inverse_nn = (vectors_nn / (eigenvalues_n.clamp_min(0) + ridge * unit)) @ vectors_nn.T
        dual_nM = inverse_nn @ change_nM
        left_out = float((dual_nM / inverse_nn.diagonal()[:, None]).norm())  # the leave-one-out residuals
        if best is None or left_out < best[0]:
            best = left_out, dual_nM
    assert best is not None
    weight_IM = features_nI.T @ best[1]
    weight_MI = (weight_IM / (features_nI @ weight_IM).square().mean().sqrt() / size_I[:, None]).T
    x_MH, y_MH = weight_MI.float().tensor_split([x_mean_nH.shape[1]], dim=1)
    return BlockRouters(x_MH=(x_MH / _ALPHA).contiguous(), y_MH=(y_MH / (1 - _ALPHA)).contiguous())


def _sizes(features_nH: Tensor) -> Tensor:
    """Root mean square of each feature, none taken for much smaller than the others: one that is always zero stays so."""
    size_H = features_nH.double().square().mean(dim=0).sqrt()
    return size_H.clamp_min(1e-3 * size_H.mean()).clamp_min(torch.finfo(torch.float64).tiny)

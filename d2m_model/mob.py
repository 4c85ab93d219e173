"""Mixture of Blocks (Sec. 3.1, Eq. 4-5): each sample runs a few blocks of a group of consecutive blocks.

The router chooses once per sample, before the group's first block. At inference a block runs on the samples that chose
it, and the other samples skip it. In training every rank runs every block on every sample and masks the result: in a
sharded run, ranks that ran different blocks would wait for each other forever.

Shapes: B batch, T tokens, H hidden size, M blocks of a group, S samples of a block, n observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Selection
from .routers.routing import float32_linear

_ALPHA = 0.5  # alpha of Eq. 5: the weight of the tokens against that of the AdaLN vector
_TEMPERATURE = 0.1  # of block_choice_loss, relative to the mean error
BLOCK_RIDGES = tuple(
    10.0**exponent for exponent in range(-4, 3)
)  # relative to the mean square of a feature; the fit chooses one

Value = TypeVar("Value")


# Routing


@dataclass(kw_only=True)  # no slots: DeepSpeed looks by vars() into what a module returns
class BlockRouting:
    """The choice of a block router: the blocks that each sample runs, bool [B, M], and their logits, float32 [B, M].

    errors_BM  in training that compares blocks: each sample's error if each block ran alone, without a graph
    """

    chosen_BM: Tensor
    logits_BM: Tensor
    active: int
    errors_BM: Tensor | None = None

    @property
    def probabilities_BM(self) -> Tensor:
        """Return p, the softmax of the logits over the group's blocks: float32 [B, M]."""
        return self.logits_BM.softmax(dim=-1)


def mean_tokens(*streams_BTH: Tensor) -> Tensor:
    """Return the mean over the tokens of all streams (image and text, or both in one): float32 [B, H]."""
    tokens = sum(stream.shape[1] for stream in streams_BTH)
    sums = [stream.sum(dim=1, dtype=torch.float32) for stream in streams_BTH]
    return torch.stack(sums).sum(dim=0) / tokens


def check_active(active: int, blocks: int) -> None:
    """Raises ValueError unless 0 <= active <= blocks."""
    if not 0 <= active <= blocks:
        raise ValueError(f"{active} active blocks; expected 0 to {blocks}, the blocks of the group.")


def route_blocks(
    x_mean_BH: Tensor, vec_BH: Tensor, router_x_MH: Tensor, router_y_MH: Tensor, active: int, selection: Selection
) -> BlockRouting:
    """Choose `active` blocks by alpha W_x mean_tokens([x, c]) + (1 - alpha) W_y vec (Eq. 5), computed in float32.

    `topk` (Eq. 5) takes the blocks with the highest logits, and the earlier of equal ones. `window` (Eq. 4) takes the
    consecutive blocks whose logits have the highest sum, and the first of equal windows.
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
    """The samples of a batch that a block runs on. `index_S` is None if it runs on all of them, or on none."""

    batch: int
    count: int
    index_S: Tensor | None

    @classmethod
    def of(cls, count: int, order_B: Tensor) -> SampleSubset:
        """Return the first `count` samples of order_B, int64 [B]."""
        batch = order_B.shape[0]
        return cls(batch=batch, count=count, index_S=order_B[:count] if 0 < count < batch else None)


def samples_per_block(routing: BlockRouting) -> list[SampleSubset]:
    """Return the samples that chose each block of the group, in the order of the blocks.

    The host waits here for the device, once per group, because it must know which blocks to skip, and a group's choice
    depends on the blocks before it. The host does not wait if all blocks run, or none (active M or 0). A compiled graph
    breaks here; a graph that must not break (torch.compile with fullgraph, a CUDA graph) runs every block and uses
    `masked`.
    """
    chosen_MB = routing.chosen_BM.T.contiguous()
    blocks, batch = chosen_MB.shape
    if routing.active in (0, blocks):
        counts = [batch if routing.active else 0] * blocks
    else:
        counts = chosen_MB.sum(dim=1).tolist()
    # Samples that run a block first, both kinds in their order: indices that stay on the device.
    order_MB = chosen_MB.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
    return [SampleSubset.of(count, order_B) for count, order_B in zip(counts, order_MB, strict=True)]


def select_rows(value: Value, samples: SampleSubset) -> Value:
    """Select the rows of `samples` from tensors whose first dimension is the batch size, also inside tuples, lists and dicts.

    Everything else is shared by all samples and returned unchanged: tensors with another first dimension (usually 1) and
    other objects. Nothing is copied if `samples` are the whole batch.
    """
    if samples.index_S is None:
        return value
    selected: Any = value
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == samples.batch:
            selected = value.index_select(0, samples.index_S)
    elif isinstance(value, dict):
        selected = {key: select_rows(item, samples) for key, item in value.items()}
    elif isinstance(value, tuple | list):
        items = [select_rows(item, samples) for item in value]
        selected = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return selected


def scatter_rows(stream_BTH: Tensor, rows_STH: Tensor, samples: SampleSubset) -> Tensor:
    """Return stream_BTH with the rows of `samples` replaced by rows_STH: a new tensor, or rows_STH for the whole batch."""
    return rows_STH if samples.index_S is None else stream_BTH.index_copy(0, samples.index_S, rows_STH)


# Training: every block on every sample


def masked(routing: BlockRouting, block: int, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return x + (1 + p - sg(p)) (y - x) where the block is chosen, else x, for its inputs x and outputs y [B, T, H].

    With stand-ins, x are the streams as these leave them.

    The value is exactly y; the gradient teaches the router: p of a chosen block grows where more of y - x would have
    helped. `block` is the position in the group. Every rank has run the block on every sample.
    """
    chosen_B11 = routing.chosen_BM[:, block, None, None]
    p_B11 = routing.probabilities_BM[:, block, None, None]
    nothing_B11 = p_B11 - p_B11.detach()
    out = []
    for before, after in zip(x, y, strict=True):
        kept = torch.where(chosen_B11, after, before)
        if nothing_B11.requires_grad:
            # Added to `kept` as a zero, so that the result is y without the rounding of x + (y - x).
            kept = kept + nothing_B11.to(kept.dtype) * (kept - before)
        out.append(kept)
    return tuple(out)


def alone(routing: BlockRouting, block: int, x: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return a block's input if it is to be compared with the group's others: x where it is chosen, else the group's input.

    With one active block, x of a chosen block is the group's input, too. `given` has no graph, so that blocks which were not
    chosen teach nothing to the blocks ahead of the group.
    """
    chosen_B11 = routing.chosen_BM[:, block, None, None]
    return tuple(torch.where(chosen_B11, before, first) for before, first in zip(x, given, strict=True))


def choice_fractions(routing: BlockRouting) -> Tensor:
    """Return the fraction of the samples that chose each block, float32 [M].

    `block_balance_loss` takes their mean over all ranks (and accumulated microbatches, if available).
    """
    return routing.chosen_BM.float().mean(dim=0)


def block_balance_loss(routing: BlockRouting, fractions_M: Tensor) -> Tensor:
    """Return GShard's balance loss of a block router: M / active sum_i fraction_i mean_b p_bi; 1 if both are uniform.

    `fractions_M` are `choice_fractions` of the global batch. The mean of p is over this rank's samples: gradients are
    averaged over ranks, which makes them those of the global batch. Zero if no block is active.
    """
    blocks = routing.logits_BM.shape[1]
    loss = blocks / max(1, routing.active) * (fractions_M.detach() * routing.probabilities_BM.mean(dim=0)).sum()
    return loss if routing.active else 0 * loss


def block_choice_loss(routing: BlockRouting, errors_BM: Tensor) -> Tensor:
    """Return the cross-entropy of p with softmax(-error / temperature), the blocks' chances by their errors: a scalar.

    `errors_BM`: each sample's error if each block of the group ran alone. The temperature is a tenth of their mean. Unlike
    the gradient of `masked`, which asks whether a chosen block is better than no block, this one asks which block is best,
    and does not fade as p nears 0 or 1.
    """
    errors_BM = errors_BM.detach().float()
    temperature = _TEMPERATURE * errors_BM.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return F.cross_entropy(routing.logits_BM, (-errors_BM / temperature).softmax(dim=-1))


# Initialisation


@dataclass(kw_only=True, slots=True, frozen=True)
class BlockRouters:
    """W_x and W_y of one group, float32 [M, H]."""

    x_MH: Tensor
    y_MH: Tensor


def random_block_routers(blocks: int, hidden_size: int, generator: torch.Generator) -> BlockRouters:
    """Return the paper's initial routers: normal, since zeros would tie and send every sample to the same blocks."""
    x_MH, y_MH = torch.randn(2, blocks, hidden_size, generator=generator) * hidden_size**-0.5
    return BlockRouters(x_MH=x_MH, y_MH=y_MH)


@torch.no_grad()
def ridge_block_routers(x_mean_nH: Tensor, vec_nH: Tensor, change_nM: Tensor) -> BlockRouters:
    """Fit block routers without training: a ridge regression from the router's inputs to the change by each block.

    Observations are samples of timesteps and prompts, taken before the group's first block; change_nM is a measure of
    each block's change, such as the norm of B(x) - x. Only differences between blocks decide, so the blocks' mean is
    subtracted from each observation. Routers have no bias, so the regression goes through the origin; the large common
    part of the features (of vec above all) carries a constant preference. There are usually fewer observations than
    features; the ridge is the one of BLOCK_RIDGES with the lowest leave-one-out error.

    The routers are scaled so that alpha and 1 - alpha of Eq. 5 cancel and logits have unit variance.
    Raises ValueError for fewer than two observations, or if all blocks change their input alike.
    """
    if len(change_nM) < 2:
        raise ValueError(f"There are {len(change_nM)} observations of the blocks; expected 2 or more.")
    change_nM = change_nM.double() - change_nM.double().mean(dim=1, keepdim=True)
    if change_nM.abs().max() == 0:
        raise ValueError("All blocks of the group change their input alike; expected blocks to choose between.")
    sizes_H = [_sizes(x_mean_nH), _sizes(vec_nH)]  # separate: features of tokens may be a thousand times those of vec
    size_I = torch.cat(sizes_H)
    features_nI = torch.cat([x_mean_nH, vec_nH], dim=1).double() / size_I
    # (F^T F + r)^-1 F^T y = F^T (F F^T + r)^-1 y; solve the right side, an n x n system.
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
    """Return the root mean square of each feature, with a floor so that a feature that is always zero stays zero."""
    size_H = features_nH.double().square().mean(dim=0).sqrt()
    return size_H.clamp_min(1e-3 * size_H.mean()).clamp_min(torch.finfo(torch.float64).tiny)

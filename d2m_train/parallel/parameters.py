"""Parameters that several ranks may share: the full tensor, and the part that this rank stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def shard_axis(shape: Sequence[int], ranks: int) -> int:
    """Return the axis along which FSDP2 shards a parameter: the first, or for stacked experts one that `ranks` divides.

    FSDP2 pads a first axis that is not divided evenly: of 12 experts on 32 ranks 20 ranks would hold none, and 32 would be
    exchanged. Other axes it takes only where they are divided evenly.
    """
    if len(shape) < 3 or shape[0] % ranks == 0:
        return 0
    return next((axis for axis in range(1, len(shape)) if shape[axis] % ranks == 0), 0)


@torch.no_grad()
def with_values(parameter: Tensor, values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor like `parameter`, on `device`, with the full tensor's `values`: a shard of them where it is sharded.

    The device never holds more of the values than this rank stores.
    """
    filled: Any = torch.empty_like(parameter, device=device)
    if hasattr(filled, "placements"):
        axis, local = filled.placements[0].dim, filled.to_local()
        share = -(-values.shape[axis] // filled.device_mesh.size())
        first = min(filled.device_mesh.get_local_rank() * share, values.shape[axis])
        local.copy_(values.narrow(axis, first, local.shape[axis]))
    else:
        filled.copy_(values)
    tensor: Tensor = filled
    return tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a parameter, sharded or not, as a plain tensor. Every rank calls this alike."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def stored_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor that a weight average is kept of: the parameter, or under ZeRO-3, whose parameters are empty
    between uses, the part that this rank stores. An FSDP2 parameter stays a DTensor."""
    stored: Tensor = getattr(tensor, "ds_tensor", tensor)
    return stored


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank stores of a parameter, as a plain tensor."""
    stored = stored_tensor(tensor)
    return stored.to_local() if hasattr(stored, "to_local") else stored


def local_share(model: nn.Module) -> float:
    """Return the part of a model's parameters that this rank stores, 0..1."""
    parameters = list(model.parameters())
    counts = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    return sum(local_tensor(parameter).numel() for parameter in parameters) / sum(counts)

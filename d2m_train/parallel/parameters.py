"""Parameters that several ranks may share: the full tensor, and the part that this rank stores."""

from __future__ import annotations

from torch import Tensor, nn


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

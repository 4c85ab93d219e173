"""Copies from the host's memory to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in memory from which a copy to `device` needs no waiting: pinned, if that is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor


def copy_to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to `device` without waiting, in its own dtype; `dtype` is given to it there."""
    copied = pinned(tensor, device).to(device, non_blocking=device.type == "cuda")
    return copied if dtype is None else copied.to(dtype)

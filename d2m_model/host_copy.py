"""Copies of a device's tensors for the host, which goes on with its work meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor

EVENTFUL = ("cuda", "xpu")  # devices with streams and pinned memory


class HostCopy:
    """A copy of a tensor that the host reads later. The copy is started at once, and the host waits in `wait` alone.

    It waits for this copy, and not for what the device was given to do after it.
    """

    def __init__(self, tensor: Tensor) -> None:
        device = tensor.device
        self.landed: torch.Event | None = None
        if device.type in EVENTFUL:
            self.values = tensor.to("cpu", non_blocking=True)
            self.landed = torch.Event(device)
            # Another device than this tensor's may be the current one.
            self.landed.record(getattr(torch, device.type).current_stream(device))
        else:
            self.values = tensor.cpu()

    def wait(self) -> Tensor:
        """Return the values, on the host. Of a device with streams they are in pinned memory."""
        if self.landed is not None:
            self.landed.synchronize()
        return self.values

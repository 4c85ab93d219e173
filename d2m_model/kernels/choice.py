"""The choice between Triton kernels and torch's operators for the routed experts, made once per device and dtype."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

SWITCH = "D2M_KERNELS"  # environment variable: `off` keeps to torch's own operators
OLDEST_CAPABILITY = (8, 0)


def has_kernels(x: torch.Tensor) -> bool:
    """Return True if the experts of x [T, H] run in Triton kernels. Graphs of torch.compile keep to torch's operators."""
    return x.is_cuda and not torch.compiler.is_compiling() and _chosen(x.device, x.dtype)


def refusal(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels do not run on this compute capability and dtype; None if they do."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return f"{SWITCH} is {os.environ[SWITCH]}"
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is neither bfloat16 nor float16"
    return None


@cache
def _chosen(device: torch.device, dtype: torch.dtype) -> bool:
    """Decide for a device and dtype, and log the decision. An out-of-memory error is raised, and decides nothing."""
    if not torch.cuda.is_available():  # tensors without values on a machine without a GPU
        return False
    reason = refusal(torch.cuda.get_device_capability(device), dtype)
    if reason is None:
        try:
            _try(device, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a missing package, compiler or driver; Triton raises types of its own
            reason = f"Triton failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    name = torch.cuda.get_device_name(device)
    how = "Triton kernels" if reason is None else f"torch's operators, since {reason}"
    logging.getLogger(__name__).info("FLUX-MoE: routed experts on %s in %s: %s.", name, dtype, how)
    return reason is None


def _try(device: torch.device, dtype: torch.dtype) -> None:
    from .fused import down_rows, sum_rows, up_rows

    rows_A = torch.arange(16, device=device)
    x_TH, weight = torch.zeros(16, 64, device=device, dtype=dtype), torch.zeros(1, 64, 64, device=device, dtype=dtype)
    gate_A, ends_E = torch.ones(16, device=device), torch.tensor([16], device=device, dtype=torch.int32)
    hidden_AF, _ = up_rows(x_TH, rows_A, rows_A, None, gate_A, ends_E, weight, weight[:, 0], False)
    sum_rows(down_rows(hidden_AF, rows_A, ends_E, weight.transpose(0, 1)), rows_A, rows_A, None, 16)

"""The choice of how the routed experts are computed: every expert at once or sorted rows, Triton or torch's operators."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

SWITCH = "D2M_KERNELS"  # environment variable: `off` keeps to torch's own operators
OLDEST_CAPABILITY = (8, 0)

# What sorted rows cost beyond their products. Fitted to a CPU core with AVX-512: gathering and
# adding up rows costs as much as so many neurons of each expert; sorting, and starting two products for each expert, as
# much as so many FLOPs.
_MOVED_NEURONS = 48
_SORT_FLOPS = 1e7
# The same on a GPU, where nothing was measured yet: an estimate that leaves the products to sorted rows in doubt.
_MOVED_SHARE_GPU = 0.1
_SORT_FLOPS_GPU = 3e9


def has_kernels(x: torch.Tensor) -> bool:
    """Return True if the experts of x [T, H] run in Triton kernels. Graphs of torch.compile keep to torch's operators."""
    return x.is_cuda and not torch.compiler.is_compiling() and _chosen(x.device, x.dtype)


def computes_every_expert(x: torch.Tensor, assignments: int, experts: int, width: int) -> bool:
    """Return True if every expert for every token of x [T, H] is cheaper than the sorted rows of these assignments.

    Never for float16, where an expert that a token did not choose may overflow, and never in graphs of torch.compile,
    which serve every number of assignments.
    """
    if assignments == 0 or x.dtype == torch.float16 or torch.compiler.is_compiling():
        return False
    tokens, hidden_size = x.shape
    row_flops = 4 * hidden_size * width
    if x.is_cpu:
        moved, sorting = _MOVED_NEURONS / width, _SORT_FLOPS
    else:
        moved, sorting = _MOVED_SHARE_GPU, _SORT_FLOPS_GPU
    return tokens * experts * row_flops < assignments * row_flops * (1 + moved) + sorting


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

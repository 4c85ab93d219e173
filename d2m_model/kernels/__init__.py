"""Triton kernels of the routed experts, for GPUs of compute capability 8.0 and newer. Triton is optional."""

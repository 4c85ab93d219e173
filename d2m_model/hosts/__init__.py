"""Hosts of a FLUX-MoE besides ComfyUI."""

"""Where a FLUX-MoE runs besides ComfyUI."""

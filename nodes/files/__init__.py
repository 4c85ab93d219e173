"""Loading, saving and converting a FLUX-MoE inside ComfyUI."""

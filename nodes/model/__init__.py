"""ComfyUI's own FLUX with expert FFNs, block groups and compressed modulations."""

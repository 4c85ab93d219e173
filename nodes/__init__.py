"""What a ComfyUI user touches. The only place that imports comfy."""

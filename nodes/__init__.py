"""The nodes for ComfyUI, and what they need of it. The only package that imports comfy."""

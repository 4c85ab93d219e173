"""The emoji FLUX (demo/) in ComfyUI: its model files, and the node Emoji FLUX Prompt in place of FLUX.1's text encoders."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .expert_map.trace_node import PIECES_KEY

_ASSETS = Path(__file__).parent.parent / "demo" / "assets"
_ENCODER = _ASSETS / "prompt-encoder.safetensors"
_MODEL_FOLDERS = ("diffusion_models", "vae", "loras")


def register() -> None:
    """Add the demo's files to ComfyUI's models, after the user's own: a user's file of the same name comes first."""
    for name in _MODEL_FOLDERS:
        folder_paths.add_model_folder_path(name, str(_ASSETS / name))


class EmojiPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="D2MEmojiPrompt",
            display_name="Emoji FLUX Prompt",
            category="FLUX-MoE",
            description="Turns words into the conditioning for the emoji FLUX, the small demo model of this pack.",
            search_aliases=["emoji", "prompt", "text encode", "clip text encode", "dense2moe demo"],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="fox in the centre on blue",
                    tooltip="An object, its place and a background colour. Words it has not learned count as unknown.",
                ),
                io.Float.Input(
                    "guidance",
                    default=3.5,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Distilled guidance, as in FLUX.1 dev.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
        )

    @classmethod
    def execute(cls, text: str, guidance: float) -> io.NodeOutput:
        from ..demo.prompt_encoder import load_prompt_encoder, padded_words

        if not _ENCODER.is_file():
            raise FileNotFoundError(
                f"{_ENCODER} is missing. It is a part of ComfyUI-Dense2MoE: install the pack again."
            )
        context, pooled = load_prompt_encoder(_ENCODER).encode([text])
        options = {"pooled_output": pooled, "guidance": guidance, PIECES_KEY: padded_words(text)}
        return io.NodeOutput([[context, options]])

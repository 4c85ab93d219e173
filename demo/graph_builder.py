"""Building of an example workflow, node by node and column by column, from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from demo.models import AUTOENCODER, CONVERTED
from demo.server import ApiGraph

PROMPT, SAMPLE = "Prompt and size", "Sample"
CALIBRATION = "Dense FLUX and calibration prompts"


@dataclass(kw_only=True, slots=True)
class Built:
    """A graph with the column and the group of each node, and the space above each column."""

    graph: ApiGraph = field(default_factory=dict)
    column: dict[str, int] = field(default_factory=dict)
    group: dict[str, str] = field(default_factory=dict)
    tops: dict[int, int] = field(default_factory=dict)


class GraphBuilder:
    """A graph that is built node by node. Each method adds nodes and returns the id to which others link.

    Nodes stand in the present column, one below the other. So that no wire passes behind a node, a node stands in the
    column before those that use it.
    """

    def __init__(self, top: int = 0) -> None:
        self.built = Built(tops={0: top})
        self.column = 0

    def next_column(self, top: int = 0) -> None:
        """Begin a column, with space above it."""
        self.column += 1
        self.built.tops[self.column] = top

    def add(self, class_type: str, *, group: str, **inputs: Any) -> str:
        node_id = str(len(self.built.graph) + 1)
        self.built.graph[node_id] = {"inputs": inputs, "class_type": class_type}
        self.built.column[node_id], self.built.group[node_id] = self.column, group
        return node_id

    def loader(self, file: str = CONVERTED, weight_dtype: str = "default") -> str:
        return self.add("D2MLoadFluxMoE", model_name=file, weight_dtype=weight_dtype, group="Model")

    def top_k(self, model: str, top_k: int, *, group: str = "Model", same_column: bool = False) -> str:
        """Add a Top-K, in the column after its MODEL's."""
        if not same_column and self.column == self.built.column[model]:
            self.next_column()
        return self.add("D2MTopK", model=[model, 0], top_k=top_k, gate="as in the file", capacity=1.0, group=group)

    def prompt(self, text: str, group: str = PROMPT) -> str:
        return self.add("D2MEmojiPrompt", text=text, guidance=3.5, group=group)

    def combine(self, prompts: Sequence[str]) -> str:
        """Combine conditionings in pairs, a column for each round."""
        while len(prompts) > 1:
            self.next_column()
            pairs = zip(prompts[::2], prompts[1::2], strict=True)
            prompts = [
                self.add("ConditioningCombine", conditioning_1=[one, 0], conditioning_2=[other, 0], group=CALIBRATION)
                for one, other in pairs
            ]
        return prompts[0]

    def convert(self, dense: str, calibration: str, *, samples: int, size: int) -> str:
        self.next_column()
        return self.add(
            "D2MConvertFlux", model=[dense, 0], preset="L", split_only=False, calibration=[calibration, 0], samples=samples,
            steps=10, size=size, seed=0, top_k=2, router="top_k", block_routers="fitted to the prompts", group="Convert",
        )  # fmt: skip

    def save_model(self, model: str, prefix: str) -> str:
        self.next_column()
        return self.add("D2MSaveFluxMoE", model=[model, 0], filename_prefix=prefix, group="Save")

    def latent(self, size: int = 128) -> str:
        return self.add("EmptySD3LatentImage", width=size, height=size, batch_size=1, group=PROMPT)

    def vae(self, file: str = AUTOENCODER) -> str:
        return self.add("VAELoader", vae_name=file, group=SAMPLE)

    def sampler(self, model: str, prompt: str, latent: str) -> str:
        """Add a sampler. At cfg 1 a negative prompt is not evaluated, so the positive one stands in for it."""
        return self.add(
            "KSampler", model=[model, 0], seed=7, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=[prompt, 0], negative=[prompt, 0], latent_image=[latent, 0], denoise=1.0, group=SAMPLE,
        )  # fmt: skip

    def decode(self, sampler: str, vae: str) -> str:
        return self.add("VAEDecode", samples=[sampler, 0], vae=[vae, 0], group=SAMPLE)

    def save(self, image: str, prefix: str, group: str = "Picture") -> str:
        if self.column == self.built.column[image]:
            self.next_column()
        return self.add("SaveImage", images=[image, 0], filename_prefix=prefix, group=group)

    def save_strip(self, images: Sequence[str], prefix: str) -> None:
        """Put images side by side, and save them."""
        strip = images[0]
        for index, image in enumerate(images[1:]):
            self.next_column(top=260 * index)  # an image from below does not pass behind the node before
            strip = self.add(
                "ImageStitch", image1=[strip, 0], image2=[image, 0], direction="right", match_image_size=True,
                spacing_width=4, spacing_color="black", group="Side by side",
            )  # fmt: skip
        self.save(strip, prefix, group="Side by side")

    def paint_and_save(self, model: str, text: str, prefix: str) -> None:
        """Add all that comes after the MODEL in a workflow with one image; the prompt stands below the MODEL's node."""
        prompt, latent = self.prompt(text), self.latent()
        self.next_column()
        sampler, vae = self.sampler(model, prompt, latent), self.vae()
        self.next_column()
        self.save(self.decode(sampler, vae), prefix)

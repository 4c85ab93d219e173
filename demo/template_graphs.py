"""The example workflows: their graphs, as /prompt takes them, and the text of their notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demo.models import AUTOENCODER, CONVERTED, LORA, TEACHER
from demo.server import ApiGraph

MODELS_NOTE = (
    f"- models/diffusion_models: **{CONVERTED}**\n"
    f"- models/vae: **{AUTOENCODER}**\n\n"
    "**make demo** makes both, and **make comfy** opens ComfyUI with them. For FLUX.1 itself, choose your own FLUX-MoE file, "
    "CLIP, VAE and image size."
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Template:
    """An example workflow, and the Markdown of its note."""

    name: str
    graph: ApiGraph
    note: str


class GraphBuilder:
    """A graph that is built node by node. Each method adds nodes and returns the id to which others link."""

    def __init__(self) -> None:
        self.graph: ApiGraph = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        node_id = str(len(self.graph) + 1)
        self.graph[node_id] = {"inputs": inputs, "class_type": class_type}
        return node_id

    def loader(self) -> str:
        return self.add("D2MLoadFluxMoE", model_name=CONVERTED, weight_dtype="default")

    def top_k(self, model: str, top_k: int) -> str:
        return self.add("D2MTopK", model=[model, 0], top_k=top_k, gate="as in the file", capacity=1.0)

    def prompt(self, text: str) -> tuple[str, str]:
        """Add positive and negative conditioning."""
        positive = self.add("D2MEmojiPrompt", text=text, guidance=3.5)
        return positive, self.add("ConditioningZeroOut", conditioning=[positive, 0])

    def latent(self) -> str:
        return self.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)

    def vae(self) -> str:
        return self.add("VAELoader", vae_name=AUTOENCODER)

    def image(self, model: str, prompt: tuple[str, str], latent: str, vae: str | None = None) -> str:
        """Add a sampler and a decoder; `vae` is a new loader, if not given."""
        sampler = self.add(
            "KSampler", model=[model, 0], seed=7, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=[prompt[0], 0], negative=[prompt[1], 0], latent_image=[latent, 0], denoise=1.0,
        )  # fmt: skip
        return self.add("VAEDecode", samples=[sampler, 0], vae=[vae or self.vae(), 0])

    def save(self, image: str, prefix: str) -> str:
        return self.add("SaveImage", images=[image, 0], filename_prefix=prefix)

    def stitch(self, left: str, right: str) -> str:
        return self.add(
            "ImageStitch", image1=[left, 0], direction="right", match_image_size=True, spacing_width=4,
            spacing_color="black", image2=[right, 0],
        )  # fmt: skip

    def paint_and_save(self, model: str, text: str, prefix: str) -> None:
        """Add all that comes after the MODEL in a workflow with one image."""
        self.save(self.image(model, self.prompt(text), self.latent()), prefix)


def text_to_image() -> Template:
    build = GraphBuilder()
    build.paint_and_save(build.top_k(build.loader(), 2), "fox in the centre on blue", "emoji-flux-moe")
    note = (
        "## Emoji FLUX as a Mixture of Experts\n\nChange **top_k** and queue again, or change it while an image is sampling. "
        "With 0 the shared expert paints alone. With 12 all experts paint, and a converted file is the dense teacher again.\n\n"
    )
    return Template(name="flux-moe-emoji", graph=build.graph, note=note + MODELS_NOTE)


def top_k_comparison() -> Template:
    build = GraphBuilder()
    loader, prompt = build.loader(), build.prompt("slice pizza in the centre on white")
    latent, vae = build.latent(), build.vae()
    images = [build.image(build.top_k(loader, k), prompt, latent, vae) for k in (0, 2, 12)]
    build.save(build.stitch(build.stitch(images[0], images[1]), images[2]), "emoji-flux-moe-top-k")
    note = (
        "## How much do more experts add?\n\nThe same noise with 0, 2 and 12 experts per token, side by side. The model "
        "is loaded once: a setting applies only to the branch in which it stands.\n\n"
    )
    return Template(name="flux-moe-top-k", graph=build.graph, note=note + MODELS_NOTE)


def lora() -> Template:
    build = GraphBuilder()
    styled = build.add("LoraLoaderModelOnly", model=[build.loader(), 0], lora_name=LORA, strength_model=1.0)
    build.paint_and_save(build.top_k(styled, 2), "panda in the left on green", "emoji-flux-moe-lora")
    note = (
        "## A LoRA of the dense FLUX\n\nLoRAs that were trained on dense FLUX.1 work with ComfyUI's own loader. This one was "
        "trained on the dense emoji FLUX and paints in sepia. Set **strength_model** to 0 to see what it changes.\n\n"
        f"- models/loras: **{LORA}**\n"
    )
    return Template(name="flux-moe-lora", graph=build.graph, note=note + MODELS_NOTE)


def schedule() -> Template:
    build = GraphBuilder()
    model = build.add(
        "D2MSchedule",
        model=[build.loader(), 0],
        setting="top_k",
        unit="percent",
        pieces="0 % - 50 %: 1\n50 % - 100 %: 6",
    )
    build.paint_and_save(model, "hot beverage in the right on purple", "emoji-flux-moe-schedule")
    note = (
        "## Experts when they are needed\n\nOne expert per token in the first half of sampling, where the outline forms, "
        "and six in the second half, where detail forms. Each line of **pieces** reads *START - END: VALUE*. The image's "
        "metadata record the settings of each step, and *FLUX-MoE Replay* samples with them again.\n\n"
    )
    return Template(name="flux-moe-schedule", graph=build.graph, note=note + MODELS_NOTE)


def expert_map() -> Template:
    build = GraphBuilder()
    masked = build.add("D2MExpertMask", model=[build.top_k(build.loader(), 2), 0], mask="")
    traced = build.add("D2MTraceRouting", model=[masked, 0])
    image = build.image(traced, build.prompt("fox in the centre on blue"), build.latent())
    shown = build.add(
        "D2MExpertMap", trace=[traced, 1], image=[image, 0], step=-1, block=-1, prompt="positive", opacity=0.75,
        numbers=True, legend=True,
    )  # fmt: skip
    build.save(shown, "emoji-flux-moe-expert-map")
    note = (
        "## Which expert painted what?\n\nQueue, then move through steps and blocks on the **Expert Map**. Point at a patch to "
        "see its path through all layers. Click an expert to mute or isolate it, and queue again.\n\n"
    )
    return Template(name="flux-moe-expert-map", graph=build.graph, note=note + MODELS_NOTE)


CALIBRATION_PROMPTS = (
    "fox in the centre on blue", "panda in the left on green", "rocket in the top on black", "cat in the left on orange",
)  # fmt: skip


def conversion() -> Template:
    build = GraphBuilder()
    teacher = build.add("UNETLoader", unet_name=TEACHER, weight_dtype="default")
    prompts = [build.add("D2MEmojiPrompt", text=text, guidance=3.5) for text in CALIBRATION_PROMPTS]
    joined = prompts[0]
    for other in prompts[1:]:
        joined = build.add("ConditioningCombine", conditioning_1=[joined, 0], conditioning_2=[other, 0])
    converted = build.add(
        "D2MConvertFlux", model=[teacher, 0], preset="L", split_only=False, calibration=[joined, 0], samples=16, steps=10,
        size=128, seed=0, top_k=2, router="top_k", block_routers="fitted to the prompts",
    )  # fmt: skip
    build.add("D2MSaveFluxMoE", model=[converted, 0], filename_prefix="diffusion_models/emoji-flux-moe")
    build.paint_and_save(build.top_k(converted, 2), "umbrella in the bottom on yellow", "emoji-flux-moe-converted")
    note = (
        "## Dense FLUX to Mixture of Experts, without training\n\nThe loaded model paints the calibration prompts. This "
        "shows which neurons matter and which belong together. *Save FLUX-MoE* writes the result to the output folder.\n\n"
        f"- models/diffusion_models: **{TEACHER}**, the dense emoji FLUX\n"
        f"- models/vae: **{AUTOENCODER}**\n\n"
        "FLUX.1 itself needs a dozen prompts or more, size 512 to 1024, and disk space for the new file."
    )
    return Template(name="flux-moe-convert", graph=build.graph, note=note)


TEMPLATES = (text_to_image(), top_k_comparison(), expert_map(), lora(), schedule(), conversion())

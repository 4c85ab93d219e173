"""What the example workflows are made of: graphs as /prompt takes them, and what their notes say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demo.server import Graph

MODEL = "emoji-flux-moe.safetensors"
MODELS_NOTE = (
    "- models/diffusion_models: **emoji-flux-moe.safetensors**\n"
    "- models/vae: **emoji-autoencoder.safetensors**\n\n"
    "**make demo** makes both; **make comfy** opens ComfyUI with them. With FLUX.1 itself take your own FLUX-MoE file, "
    "CLIP, VAE and size."
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Template:
    """A workflow, and the Markdown of its note."""

    name: str
    graph: Graph
    note: str


class Build:
    """A graph node by node; a node's id is what others link to."""

    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        name = str(len(self.graph) + 1)
        self.graph[name] = {"inputs": inputs, "class_type": class_type}
        return name

    def loader(self) -> str:
        return self.add("D2MLoadFluxMoE", model_name=MODEL, weight_dtype="default")

    def prompt(self, text: str) -> tuple[str, str]:
        """Positive and negative."""
        positive = self.add("D2MEmojiPrompt", text=text, guidance=3.5)
        return positive, self.add("ConditioningZeroOut", conditioning=[positive, 0])

    def latent(self, size: int = 128) -> str:
        return self.add("EmptySD3LatentImage", width=size, height=size, batch_size=1)

    def sampler(self, model: str, prompt: tuple[str, str], latent: str, seed: int = 7) -> str:
        return self.add(
            "KSampler", model=[model, 0], seed=seed, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=[prompt[0], 0], negative=[prompt[1], 0], latent_image=[latent, 0], denoise=1.0,
        )  # fmt: skip

    def vae(self) -> str:
        return self.add("VAELoader", vae_name="emoji-autoencoder.safetensors")

    def decode(self, sampler: str, vae: str) -> str:
        return self.add("VAEDecode", samples=[sampler, 0], vae=[vae, 0])

    def save(self, image: str, prefix: str, slot: int = 0) -> str:
        return self.add("SaveImage", images=[image, slot], filename_prefix=prefix)

    def top_k(self, model: str, top_k: int) -> str:
        return self.add("D2MTopK", model=[model, 0], top_k=top_k, gate="as in the file", capacity=1.0)

    def stitch(self, left: str, right: str) -> str:
        return self.add(
            "ImageStitch", image1=[left, 0], direction="right", match_image_size=True, spacing_width=4,
            spacing_color="black", image2=[right, 0],
        )  # fmt: skip


def text_to_image() -> Template:
    build = Build()
    model = build.top_k(build.loader(), 2)
    prompt, latent = build.prompt("fox in the centre on blue"), build.latent()
    sampler = build.sampler(model, prompt, latent)
    build.save(build.decode(sampler, build.vae()), "emoji-flux-moe")
    note = (
        "## Emoji FLUX as a Mixture of Experts\n\nMove **top_k** and queue again, or move it while an image is sampling: 0 "
        "paints with the shared expert alone, 12 with all experts, which for a converted file is the dense teacher.\n\n"
    )
    return Template(name="flux-moe-emoji", graph=build.graph, note=note + MODELS_NOTE)


def top_k_comparison() -> Template:
    build = Build()
    loader, prompt, latent, vae = (
        build.loader(), build.prompt("slice pizza in the centre on white"), build.latent(), build.vae(),
    )  # fmt: skip
    images = []
    for k in (0, 2, 12):
        sampler = build.sampler(build.top_k(loader, k), prompt, latent)
        images.append(build.decode(sampler, vae))
    strip = build.stitch(build.stitch(images[0], images[1]), images[2])
    build.save(strip, "emoji-flux-moe-top-k")
    note = (
        "## How much do more experts add?\n\nThe same noise with 0, 2 and 12 experts for each token, side by side. The model "
        "is loaded once: a setting belongs to the branch that it stands in.\n\n"
    )
    return Template(name="flux-moe-top-k", graph=build.graph, note=note + MODELS_NOTE)


def lora() -> Template:
    build = Build()
    loader = build.loader()
    styled = build.add(
        "LoraLoaderModelOnly", model=[loader, 0], lora_name="emoji-sepia-lora.safetensors", strength_model=1.0
    )
    prompt, latent = build.prompt("panda in the left on green"), build.latent()
    sampler = build.sampler(build.top_k(styled, 2), prompt, latent)
    build.save(build.decode(sampler, build.vae()), "emoji-flux-moe-lora")
    note = (
        "## A LoRA of the dense FLUX\n\nLoRAs that were trained on dense FLUX.1 go through ComfyUI's own loader. This one was "
        "trained on the dense emoji FLUX and paints in sepia; set **strength_model** to 0 to see what it changes.\n\n"
        "- models/loras: **emoji-sepia-lora.safetensors**\n"
    )
    return Template(name="flux-moe-lora", graph=build.graph, note=note + MODELS_NOTE)


def schedule() -> Template:
    build = Build()
    model = build.add(
        "D2MSchedule", model=[build.loader(), 0], setting="top_k", unit="percent", pieces="0 - 0.5: 1\n0.5 - 1: 6"
    )
    prompt, latent = build.prompt("hot beverage in the right on purple"), build.latent()
    sampler = build.sampler(model, prompt, latent)
    build.save(build.decode(sampler, build.vae()), "emoji-flux-moe-schedule")
    note = (
        "## Experts when they are needed\n\nOne expert for each token in the first half of sampling, where the outline forms, "
        "six in the second, where detail does. Each line of **pieces** is *START - END: VALUE*. The image's metadata say what "
        "each step used, and *FLUX-MoE Replay* samples by them again.\n\n"
    )
    return Template(name="flux-moe-schedule", graph=build.graph, note=note + MODELS_NOTE)


def expert_map() -> Template:
    build = Build()
    masked = build.add("D2MExpertMask", model=[build.top_k(build.loader(), 2), 0], mask="")
    traced = build.add("D2MTraceRouting", model=[masked, 0])
    prompt, latent = build.prompt("fox in the centre on blue"), build.latent()
    image = build.decode(build.sampler(traced, prompt, latent), build.vae())
    shown = build.add(
        "D2MExpertMap", trace=[traced, 1], image=[image, 0], step=-1, block=-1, prompt="positive", opacity=0.75,
        numbers=True, legend=True,
    )  # fmt: skip
    build.save(shown, "emoji-flux-moe-expert-map")
    note = (
        "## Which expert painted what?\n\nQueue, then move through steps and blocks on the **Expert Map**. Point at a patch to "
        "see its way through all layers; click an expert to mute or to isolate it, and queue again.\n\n"
    )
    return Template(name="flux-moe-expert-map", graph=build.graph, note=note + MODELS_NOTE)


CALIBRATION = (
    "fox in the centre on blue", "panda in the left on green", "rocket in the top on black", "cat in the left on orange",
)  # fmt: skip


def conversion() -> Template:
    build = Build()
    teacher = build.add("UNETLoader", unet_name="emoji-flux.safetensors", weight_dtype="default")
    prompts = [build.add("D2MEmojiPrompt", text=text, guidance=3.5) for text in CALIBRATION]
    joined = prompts[0]
    for other in prompts[1:]:
        joined = build.add("ConditioningCombine", conditioning_1=[joined, 0], conditioning_2=[other, 0])
    converted = build.add(
        "D2MConvertFlux", model=[teacher, 0], preset="L", split_only=False, calibration=[joined, 0], samples=16, steps=10,
        size=128, seed=0, top_k=2, router="top_k", block_routers="fitted to the prompts",
    )  # fmt: skip
    build.add("D2MSaveFluxMoE", model=[converted, 0], filename_prefix="diffusion_models/emoji-flux-moe")
    prompt, latent = build.prompt("umbrella in the bottom on yellow"), build.latent()
    sampler = build.sampler(build.top_k(converted, 2), prompt, latent)
    build.save(build.decode(sampler, build.vae()), "emoji-flux-moe-converted")
    note = (
        "## Dense FLUX to Mixture of Experts, without training\n\nThe loaded model paints the calibration prompts and says "
        "which neurons matter and which belong together. *Save FLUX-MoE* writes the result to the output folder.\n\n"
        "- models/diffusion_models: **emoji-flux.safetensors**, the dense emoji FLUX\n"
        "- models/vae: **emoji-autoencoder.safetensors**\n\n"
        "For FLUX.1 itself: a dozen prompts or more, size 512 to 1024, and disk space for the new file."
    )
    return Template(name="flux-moe-convert", graph=build.graph, note=note)


TEMPLATES = (text_to_image(), top_k_comparison(), expert_map(), lora(), schedule(), conversion())

"""The example workflows, in the order in which one learns: their graphs as /prompt takes them, notes and layout."""

from __future__ import annotations

from dataclasses import dataclass

from demo.graph_builder import CALIBRATION, PROMPT, Built, GraphBuilder
from demo.models import LORA, TEACHER
from demo.server import ApiGraph

READY = (
    "\n\nThe emoji FLUX and its VAE come with the pack, so everything here runs at once. With FLUX.1 the nodes are the same: "
    "see the templates 7 to 9."
)
FLUX_FILES = (
    "- models/diffusion_models: **{model}**\n"
    "- models/text_encoders: **clip_l.safetensors**, **{t5}**\n"
    "- models/vae: **ae.safetensors**\n\n"
    "Other names? Choose yours in the loaders."
)
FLUX_MOE = "flux1-dev-moe-L.safetensors"


@dataclass(kw_only=True, slots=True, frozen=True)
class Template:
    """An example workflow.

    name      of its twin in example_workflows/api
    title     what its card shows, which is the name of its file
    line      what it shows, in one line: written on its thumbnail
    note      Markdown of its note
    runs      runs with the files of the pack alone
    """

    name: str
    title: str
    line: str
    built: Built
    note: str
    runs: bool = True

    @property
    def graph(self) -> ApiGraph:
        return self.built.graph


def text_to_image() -> Template:
    build = GraphBuilder()
    model = build.top_k(build.loader(), 2)
    build.paint_and_save(model, "fox in the centre on blue", "emoji-flux-moe")
    note = (
        "## First picture\n\n"
        "Press **Run**. Then change **top_k** and run again, or change it while an image is sampling. With 0 "
        "the shared expert paints alone. With 12 all experts paint, and a converted file is the dense teacher again. The line "
        "under the slider says what it costs."
    )
    return Template(
        name="flux-moe-emoji", title="1 First picture", line="0 to 12 experts, by a slider", built=build.built,
        note=note + READY,
    )  # fmt: skip


def top_k_comparison() -> Template:
    build = GraphBuilder()
    loader = build.loader()
    models = [build.top_k(loader, k, group="Three values of Top-K") for k in (0, 2, 12)]
    prompt, latent = build.prompt("slice pizza in the centre on white"), build.latent()
    build.next_column()
    samplers = [build.sampler(model, prompt, latent) for model in models]
    vae = build.vae()
    build.next_column()
    images = [build.decode(sampler, vae) for sampler in samplers]
    build.save_strip(images, "emoji-flux-moe-top-k")
    note = (
        "## Compare Top-K values\n\n"
        "Press **Run**: the same noise with 0, 2 and 12 experts per token, side by side. The model is "
        "loaded once: a setting applies only to the branch in which it stands. Nothing has to be wired; change the three "
        "**top_k** to compare other values."
    )
    return Template(
        name="flux-moe-top-k", title="2 Compare Top-K values", line="One noise, three values",
        built=build.built, note=note + READY,
    )  # fmt: skip


def expert_map() -> Template:
    build = GraphBuilder()
    model = build.top_k(build.loader(), 2)
    build.next_column()
    masked = build.add("D2MExpertMask", model=[model, 0], mask="", group="Model")
    build.next_column()
    traced = build.add("D2MTraceRouting", model=[masked, 0], group="Model")
    prompt, latent = build.prompt("fox in the centre on blue"), build.latent()
    build.next_column(top=150)  # the trace passes above the sampler
    sampler, vae = build.sampler(traced, prompt, latent), build.vae()
    build.next_column(top=150)
    image = build.decode(sampler, vae)
    build.next_column()
    shown = build.add(
        "D2MExpertMap", trace=[traced, 1], image=[image, 0], step=-1, block=-1, prompt="positive", opacity=0.75,
        numbers=True, legend=True, group="Expert map",
    )  # fmt: skip
    build.next_column()
    build.save(shown, "emoji-flux-moe-expert-map", group="Expert map")
    note = (
        "## Expert map\n\n"
        "Press **Run**, then move through steps and blocks on the **Expert Map**, at the right. Point at a patch "
        "to see its path through all layers. Click an expert to mute or isolate it, and run again."
    )
    return Template(
        name="flux-moe-expert-map", title="3 Expert map", line="Which expert painted what", built=build.built,
        note=note + READY,
    )  # fmt: skip


def lora() -> Template:
    build = GraphBuilder()
    loader = build.loader()
    build.next_column()
    styled = build.add(
        "LoraLoaderModelOnly", model=[loader, 0], lora_name=LORA, strength_model=1.0, group="Model"
    )  # fmt: skip
    build.paint_and_save(build.top_k(styled, 2), "panda in the left on green", "emoji-flux-moe-lora")
    note = (
        "## LoRA of the dense FLUX\n\n"
        "LoRAs that were trained on dense FLUX.1 work with ComfyUI's own loader. This one was trained "
        "on the dense emoji FLUX and paints in sepia. Set **strength_model** to 0 to see what it changes."
    )
    return Template(
        name="flux-moe-lora", title="4 LoRA", line="LoRAs of dense FLUX.1 work", built=build.built, note=note + READY
    )


def schedule() -> Template:
    build = GraphBuilder()
    loader = build.loader()
    build.next_column()
    pieces = "0 % - 50 %: 1\n50 % - 100 %: 6"
    model = build.add("D2MSchedule", model=[loader, 0], setting="top_k", unit="percent", pieces=pieces, group="Model")
    build.paint_and_save(model, "hot beverage in the right on purple", "emoji-flux-moe-schedule")
    note = (
        "## Experts when they are needed\n\n"
        "One expert per token in the first half of sampling, where the outline forms, and six "
        "in the second half, where detail forms. Each line of **pieces** reads *START % - END %: VALUE*. The image's metadata "
        "record the settings of each step, and *FLUX-MoE Replay* samples with them again."
    )
    return Template(
        name="flux-moe-schedule", title="5 Schedule", line="Few experts first, more later", built=build.built,
        note=note + READY,
    )  # fmt: skip


def budget() -> Template:
    build = GraphBuilder()
    loader = build.loader()
    build.next_column()
    model = build.add("D2MBudget", model=[loader, 0], budget=0.65, group="Model")
    build.paint_and_save(model, "rocket in the top on black", "emoji-flux-moe-budget")
    note = (
        "## Compute where it counts\n\n"
        "**budget** is the share of the dense model's FLOPs. Move it while an image is sampling. It is spent on the FFNs and "
        "steps that need experts most, by a sensitivity table in the file. A file without one gets one Top-K for all; "
        "`python -m d2m_train sensitivity` measures it."
    )
    return Template(
        name="flux-moe-budget", title="5b Compute budget", line="One slider, spent where it counts", built=build.built,
        note=note + READY,
    )  # fmt: skip


CALIBRATION_PROMPTS = (
    "fox in the centre on blue", "panda in the left on green", "rocket in the top on black", "cat in the left on orange",
)  # fmt: skip
SCENES = (
    "a photograph of an old fisherman mending a net", "an oil painting of a harbour at dawn",
    "a bowl of ramen, seen from above", "a poster with the words GRAND OPENING",
)  # fmt: skip


def conversion() -> Template:
    build = GraphBuilder()
    prompts = [build.prompt(text, group=CALIBRATION) for text in CALIBRATION_PROMPTS]
    joined = build.combine(prompts)
    dense = build.add("UNETLoader", unet_name=TEACHER, weight_dtype="default", group=CALIBRATION)
    converted = build.convert(dense, joined, samples=16, size=128)
    build.save_model(converted, "diffusion_models/emoji-flux-moe")
    build.paint_and_save(
        build.top_k(converted, 2, same_column=True), "umbrella in the bottom on yellow", "emoji-flux-moe-converted"
    )
    note = (
        "## Convert the emoji FLUX, without training\n\n"
        "The dense model paints the calibration prompts, which shows which neurons "
        "matter and which belong together. *Save FLUX-MoE* writes the result to the output folder; move it to "
        "models/diffusion_models to load it."
    )
    return Template(
        name="flux-moe-convert", title="6 Convert the emoji FLUX", line="Dense to MoE, no training", built=build.built,
        note=note + READY,
    )  # fmt: skip


def flux_text_encoders(build: GraphBuilder, t5: str, group: str = PROMPT) -> str:
    return build.add(
        "DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2=t5, type="flux", device="default", group=group
    )


FOX = "a red fox in fresh snow, morning light, photograph"


def _flux_template(name: str, title: str, line: str, t5: str, weight_dtype: str, text: str) -> Template:
    """A FLUX.1 as a FLUX-MoE, at 1024²."""
    build = GraphBuilder(top=360)  # the model's nodes are in the row above
    clip = flux_text_encoders(build, t5)
    build.next_column()
    loader = build.loader(FLUX_MOE, weight_dtype)
    encoded = build.add("CLIPTextEncode", text=FOX, clip=[clip, 0], group=PROMPT)
    model = build.top_k(loader, 2)
    guided = build.add("FluxGuidance", conditioning=[encoded, 0], guidance=3.5, group=PROMPT)
    latent = build.latent(1024)
    build.next_column()
    sampler, vae = build.sampler(model, guided, latent), build.vae("ae.safetensors")
    build.next_column()
    build.save(build.decode(sampler, vae), "flux-moe")
    note = f"## {title[2:]}\n\n{text}\n\n" + FLUX_FILES.format(model=FLUX_MOE, t5=t5)
    return Template(name=name, title=title, line=line, built=build.built, note=note, runs=False)


def load_flux1() -> Template:
    text = (
        "FLUX.1 dev as a FLUX-MoE, at 1024² pixels: 5.2 of 12 billion parameters work on a token. No FLUX-MoE file yet? "
        "Template 8 makes one of the FLUX.1 that you have."
    )
    return _flux_template(
        "flux-moe-flux1", "7 FLUX.1 as a FLUX-MoE", "FLUX.1 at 1024 x 1024", "t5xxl_fp16.safetensors", "default", text
    )


def load_flux_fp8() -> Template:
    text = (
        "With **weight_dtype** fp8_e4m3fn the experts are held in a byte a weight, at some loss, and fit where bfloat16 does "
        "not; routers keep their precision. Files that are quantised already are loaded with *default*."
    )
    return _flux_template(
        "flux-moe-flux1-fp8", "9 FLUX.1 in fp8", "Half the memory", "t5xxl_fp8_e4m3fn.safetensors", "fp8_e4m3fn", text
    )


def convert_flux() -> Template:
    build = GraphBuilder()
    t5 = "t5xxl_fp16.safetensors"
    clip = flux_text_encoders(build, t5, group=CALIBRATION)
    build.next_column()
    scenes = [
        build.add("CLIPTextEncode", text=text, clip=[clip, 0], group=CALIBRATION) for text in SCENES
    ]  # fmt: skip
    joined = build.combine(scenes)
    dense = build.add("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default", group=CALIBRATION)
    converted = build.convert(dense, joined, samples=64, size=512)
    build.save_model(converted, "diffusion_models/flux1-dev-moe-L")
    models = [build.top_k(converted, k, group="Three values of Top-K", same_column=True) for k in (0, 2, 12)]
    prompt = build.add("FluxGuidance", conditioning=[scenes[-1], 0], guidance=3.5, group=PROMPT)
    latent = build.latent(1024)
    build.next_column()
    samplers = [build.sampler(model, prompt, latent) for model in models]
    vae = build.vae("ae.safetensors")
    build.next_column()
    build.save_strip([build.decode(sampler, vae) for sampler in samplers], "flux-moe-top-k")
    note = (
        "## Convert FLUX.1, save it, compare Top-K\n\n"
        "The FLUX.1 that you have paints the calibration prompts at 512², becomes a "
        "FLUX-MoE without training, is saved to the output folder, and paints one noise with 0, 2 and 12 experts. A dozen "
        "prompts or more of your kind of picture calibrate better. It needs the memory to run the dense model, and disk space "
        "for the new file.\n\n"
    )
    return Template(
        name="flux-moe-flux1-convert", title="8 Convert FLUX.1 and compare", line="Convert, save, compare Top-K",
        built=build.built, note=note + FLUX_FILES.format(model="flux1-dev.safetensors", t5=t5), runs=False,
    )  # fmt: skip


TEMPLATES = (
    text_to_image(), top_k_comparison(), expert_map(), lora(), schedule(), budget(), conversion(), load_flux1(), convert_flux(),
    load_flux_fp8(),
)  # fmt: skip

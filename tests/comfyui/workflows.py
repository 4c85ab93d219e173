"""Workflows of FLUX users, made of ComfyUI's own nodes: functions from a MODEL and a latent to the samples.

Their files (ControlNets, the Redux encoder) are tiny and random, in the formats that ComfyUI's loaders know.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.dataset import EMOJI_AUTOENCODER
from demo.in_process import Comfy
from tests.toys import files

CONTROL_DIMS = replace(files.DIMS, double_blocks=2, single_blocks=1)
REDUX = 48  # width of its image tokens
SEED = 5
SIZE = (8, 8)  # of latents; images are eight times as large

Conditioning = list[Any]
Latent = dict[str, Any]


@dataclass
class Studio:
    """A ComfyUI with the files in its folders."""

    host: Comfy

    def __post_init__(self) -> None:
        models = self.host.base / "models"
        for name, tensors in CONTROL_NETS.items():
            (models / "controlnet").mkdir(parents=True, exist_ok=True)
            save_file(tensors(), models / "controlnet" / f"{name}.safetensors")
        (models / "vae").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(EMOJI_AUTOENCODER, models / "vae" / "tiny.safetensors")
        self.vae = self.host.run("VAELoader", vae_name="tiny.safetensors")
        self.image = torch.rand(1, 8 * SIZE[0], 8 * SIZE[1], 3, generator=torch.Generator().manual_seed(11))
        self.mask = (self.image[..., 0] > 0.5).float()

    def run(self, node_id: str, **inputs: Any) -> Any:
        """All outputs of one of ComfyUI's nodes; "module:Class" is one of comfy_extras."""
        module, _, name = node_id.rpartition(":")
        with torch.inference_mode():
            extras = importlib.import_module(f"comfy_extras.{module}") if module else None
            node = getattr(extras, name) if extras is not None else self.host.nodes.NODE_CLASS_MAPPINGS[name]
            if hasattr(node, "define_schema"):
                return node.execute(**inputs).result
            return getattr(node(), node.FUNCTION)(**inputs)

    def prompts(self, model: Any) -> tuple[Conditioning, Conditioning, Conditioning]:
        """A prompt, a negative prompt and one more."""
        first, second, third = (self.host.conditioning(model, seed) for seed in (1, 2, 3))
        return first, second, third

    def sample(
        self, model: Any, positive: Conditioning, negative: Conditioning, latent: Latent, cfg: float = 3.0,
        sampler_name: str = "euler", denoise: float = 1.0, steps: int = 2,
    ) -> Tensor:  # fmt: skip
        (found,) = self.run(
            "KSampler", model=model, seed=SEED, steps=steps, cfg=cfg, sampler_name=sampler_name, scheduler="simple",
            positive=positive, negative=negative, latent_image=latent, denoise=denoise,
        )  # fmt: skip
        samples: Tensor = found["samples"]
        return samples

    def guided(self, model: Any, guider: Any, latent: Latent) -> Tensor:
        """SamplerCustomAdvanced."""
        custom = "nodes_custom_sampler"
        (noise,) = self.run(f"{custom}:RandomNoise", noise_seed=SEED)
        (sampler,) = self.run(f"{custom}:KSamplerSelect", sampler_name="euler")
        (sigmas,) = self.run(f"{custom}:BasicScheduler", model=model, scheduler="simple", steps=2, denoise=1.0)
        inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
        samples: Tensor = self.run(f"{custom}:SamplerCustomAdvanced", **inputs)[0]["samples"]
        return samples


# Files


def residuals(tensors: dict[str, Tensor], prefix: str, count: int, suffix: str = "") -> None:
    generator, h = torch.Generator().manual_seed(21 + count), CONTROL_DIMS.hidden_size
    for i in range(count):
        tensors[f"{prefix}.{i}{suffix}.weight"] = torch.randn(h, h, generator=generator) * h**-0.5
        tensors[f"{prefix}.{i}{suffix}.bias"] = torch.randn(h, generator=generator) * 0.1


def convolutions(tensors: dict[str, Tensor], prefix: str, channels: list[tuple[int, int, int]]) -> None:
    """(in, out, kernel) of every second module."""
    generator = torch.Generator().manual_seed(22)
    for i, (width, out, kernel) in enumerate(channels):
        weight = torch.randn(out, width, kernel, kernel, generator=generator) * (width * kernel**2) ** -0.5
        tensors |= {f"{prefix}.{2 * i}.weight": weight, f"{prefix}.{2 * i}.bias": torch.zeros(out)}


def control_flux() -> dict[str, Tensor]:
    dense = files.dense_flux(CONTROL_DIMS, seed=20)
    tensors = {name: tensor for name, tensor in dense.items() if not name.startswith("final_layer")}
    tensors["pos_embed_input.weight"] = tensors["img_in.weight"].flip(0).contiguous()
    tensors["pos_embed_input.bias"] = tensors["img_in.bias"].flip(0).contiguous()
    return tensors


def xlabs() -> dict[str, Tensor]:
    tensors = control_flux()
    residuals(tensors, "controlnet_blocks", CONTROL_DIMS.double_blocks)
    residuals(tensors, "controlnet_single_blocks", CONTROL_DIMS.single_blocks)
    convolutions(tensors, "input_hint_block", [(3, 16, 3)] + [(16, 16, 3)] * 7)
    return tensors


def mistoline() -> dict[str, Tensor]:
    tensors = control_flux()
    residuals(tensors, "controlnet_blocks", CONTROL_DIMS.double_blocks, ".linear")
    residuals(tensors, "single_controlnet_blocks", CONTROL_DIMS.single_blocks, ".linear")
    kernels = (3, 1, 3, 3, 3, 3, 3, 3, 1, 3)
    convolutions(tensors, "input_cond_block.encoder", [(3 if not i else 16, 16, k) for i, k in enumerate(kernels)])
    return tensors


def union() -> dict[str, Tensor]:
    """InstantX's, by diffusers' names."""
    import comfy.utils

    flux = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in control_flux().items()}
    sizes = {"depth": CONTROL_DIMS.double_blocks, "depth_single_blocks": CONTROL_DIMS.single_blocks}
    tensors: dict[str, Tensor] = {}
    for name, place in comfy.utils.flux_to_diffusers({**sizes, "hidden_size": CONTROL_DIMS.hidden_size}).items():
        if isinstance(place, str) and place in flux and "linear_in" not in name and "linear_out" not in name:
            tensors[name] = flux[place].clone()
        elif not isinstance(place, str) and place[1] is not None:
            tensors[name] = flux[place[0]].narrow(*place[1]).clone()
    residuals(tensors, "controlnet_blocks", CONTROL_DIMS.double_blocks)
    residuals(tensors, "controlnet_single_blocks", CONTROL_DIMS.single_blocks)
    tensors["controlnet_mode_embedder.weight"] = torch.randn(10, 128, generator=torch.Generator().manual_seed(23))
    return tensors


CONTROL_NETS = {"xlabs": xlabs, "mistoline": mistoline, "union": union}


# Workflows


def cfg(studio: Studio, model: Any, latent: Latent) -> Tensor:
    positive, negative, _ = studio.prompts(model)
    return studio.sample(model, positive, negative, latent)


def two_evaluations_a_step(studio: Studio, model: Any, latent: Latent) -> Tensor:
    positive, negative, _ = studio.prompts(model)
    return studio.sample(model, positive, negative, latent, sampler_name="heun")


def image_to_image(studio: Studio, model: Any, latent: Latent) -> Tensor:
    positive, negative, _ = studio.prompts(model)
    (encoded,) = studio.run("VAEEncode", pixels=studio.image, vae=studio.vae)
    image = {**latent, "samples": encoded["samples"].expand_as(latent["samples"]), "noise_mask": studio.mask}
    return studio.sample(model, positive, negative, image, denoise=0.7)


def control_net(
    *names: str, start: float = 0.0, end: float = 1.0, kind: str = "depth"
) -> Callable[[Studio, Any, Latent], Tensor]:
    def workflow(studio: Studio, model: Any, latent: Latent) -> Tensor:
        positive, negative, _ = studio.prompts(model)
        for name in names:
            (net,) = studio.run("ControlNetLoader", control_net_name=f"{name}.safetensors")
            if name == "union":
                (net,) = studio.run("nodes_controlnet:SetUnionControlNetType", control_net=net, type=kind)
            positive, negative = studio.run(
                "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net, image=studio.image,
                strength=0.8, start_percent=start, end_percent=end, vae=studio.vae,
            )  # fmt: skip
        return studio.sample(model, positive, negative, latent)

    return workflow


def kontext(*heights: int, method: str | None = None) -> Callable[[Studio, Any, Latent], Tensor]:
    """Reference latents, one for every height."""

    def workflow(studio: Studio, model: Any, latent: Latent) -> Tensor:
        positive, negative, _ = studio.prompts(model)
        for seed, height in enumerate(heights):
            samples = torch.randn(1, 16, height, SIZE[1], generator=torch.Generator().manual_seed(30 + seed))
            (positive,) = studio.run(
                "nodes_edit_model:ReferenceLatent", conditioning=positive, latent={"samples": samples}
            )
        if method is not None:
            node = "nodes_flux:FluxKontextMultiReferenceLatentMethod"
            (positive,) = studio.run(node, conditioning=positive, reference_latents_method=method)
        return studio.sample(model, positive, negative, latent)

    return workflow


def redux(strength: float, strength_type: str) -> Callable[[Studio, Any, Latent], Tensor]:
    def workflow(studio: Studio, model: Any, latent: Latent) -> Tensor:
        import comfy.sd
        from comfy.ldm.flux.redux import ReduxImageEncoder

        encoder, generator = ReduxImageEncoder(REDUX, files.DIMS.context_size), torch.Generator().manual_seed(40)
        for parameter in encoder.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5

        class Seen:
            last_hidden_state = torch.randn(1, 5, REDUX, generator=generator)

        positive, negative, _ = studio.prompts(model)
        (positive,) = studio.run(
            "StyleModelApply", conditioning=positive, style_model=comfy.sd.StyleModel(encoder),
            clip_vision_output=Seen(), strength=strength, strength_type=strength_type,
        )  # fmt: skip
        return studio.sample(model, positive, negative, latent)

    return workflow


def fill(studio: Studio, model: Any, latent: Latent) -> Tensor:
    positive, negative, _ = studio.prompts(model)
    positive, negative, made = studio.run(
        "InpaintModelConditioning", positive=positive, negative=negative, vae=studio.vae, pixels=studio.image,
        mask=studio.mask, noise_mask=True,
    )  # fmt: skip
    made["samples"] = made["samples"].expand_as(latent["samples"])
    return studio.sample(model, positive, negative, {**latent, **made})


def depth(studio: Studio, model: Any, latent: Latent) -> Tensor:
    positive, negative, _ = studio.prompts(model)
    inputs = {"positive": positive, "negative": negative, "vae": studio.vae, "pixels": studio.image}
    positive, negative, _ = studio.run("nodes_ip2p:InstructPixToPixConditioning", **inputs)
    return studio.sample(model, positive, negative, latent)


def areas(studio: Studio, model: Any, latent: Latent) -> Tensor:
    """Two prompts, each for a part of the image: evaluated in batches of their own."""
    positive, negative, other = studio.prompts(model)
    half = 4 * SIZE[1]
    (left,) = studio.run("ConditioningSetArea", conditioning=positive, width=half, height=64, x=0, y=0, strength=1.0)
    (right,) = studio.run("ConditioningSetArea", conditioning=other, width=half, height=64, x=half, y=0, strength=1.0)
    return studio.sample(model, left + right + other, negative, latent)


def basic_guider(studio: Studio, model: Any, latent: Latent) -> Tensor:
    inputs = {"model": model, "conditioning": studio.prompts(model)[0]}
    return studio.guided(model, *studio.run("nodes_custom_sampler:BasicGuider", **inputs), latent)


def dual_cfg_guider(studio: Studio, model: Any, latent: Latent) -> Tensor:
    positive, negative, other = studio.prompts(model)
    (guider,) = studio.run(
        "nodes_custom_sampler:DualCFGGuider", model=model, cond1=positive, cond2=other, negative=negative,
        cfg_conds=3.0, cfg_cond2_negative=2.0, style="regular",
    )  # fmt: skip
    return studio.guided(model, guider, latent)


def perp_neg_guider(studio: Studio, model: Any, latent: Latent) -> Tensor:
    positive, negative, empty = studio.prompts(model)
    (guider,) = studio.run(
        "nodes_perpneg:PerpNegGuider", model=model, positive=positive, negative=negative,
        empty_conditioning=empty, cfg=3.0, neg_scale=1.0,
    )  # fmt: skip
    return studio.guided(model, guider, latent)


def patched(node_id: str, **inputs: Any) -> Callable[[Studio, Any, Latent], Tensor]:
    """A node that gives a MODEL for a MODEL, then CFG."""

    def workflow(studio: Studio, model: Any, latent: Latent) -> Tensor:
        positive, negative, _ = studio.prompts(model)
        clone, *_ = studio.run(node_id, model=model, **inputs)
        return studio.sample(clone, positive, negative, latent, steps=4)

    return workflow


WORKFLOWS: dict[str, Callable[[Studio, Any, Latent], Tensor]] = {
    "CFG": cfg,
    "two evaluations a step": two_evaluations_a_step,
    "image to image with a mask": image_to_image,
    "ControlNet of XLabs": control_net("xlabs"),
    "ControlNet of MistoLine": control_net("mistoline"),
    "ControlNet Union": control_net("union"),
    "two ControlNets for the first steps": control_net("union", "xlabs", end=0.5),
    "Kontext": kontext(8),
    "Kontext, two references": kontext(8, 12),
    "Kontext, references by index": kontext(8, 4, method="index"),
    "Kontext, uxo": kontext(8, 4, method="uxo/uno"),
    "Redux": redux(0.7, "multiply"),
    "Redux by attention": redux(0.5, "attn_bias"),
    "Fill": fill,
    "Depth": depth,
    "prompts for areas": areas,
    "BasicGuider": basic_guider,
    "DualCFGGuider": dual_cfg_guider,
    "PerpNegGuider": perp_neg_guider,
    "ModelSamplingFlux": patched(
        "nodes_model_advanced:ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=64, height=64
    ),
    "ScaleROPE": patched(
        "nodes_rope:ScaleROPE", scale_x=1.5, scale_y=0.8, shift_x=3.0, shift_y=0.0, scale_t=1.0, shift_t=1.0
    ),
    "SkipLayerGuidanceDiT": patched(
        "nodes_slg:SkipLayerGuidanceDiT", double_layers="1", single_layers="0, 2", scale=2.0, start_percent=0.0,
        end_percent=1.0,
    ),
    "NAGuidance": patched("nodes_nag:NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    "FreSca": patched("nodes_fresca:FreSca", scale_low=1.0, scale_high=1.25, freq_cutoff=2),
    "APG": patched("nodes_apg:APG", eta=1.0, norm_threshold=5.0, momentum=0.0),
    "CFGZeroStar": patched("nodes_cfg:CFGZeroStar"),
    "EasyCache": patched(
        "nodes_easycache:EasyCacheNode", reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False
    ),
    "LazyCache": patched(
        "nodes_easycache:LazyCacheNode", reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False
    ),
}  # fmt: skip
# EasyCache and LazyCache ask the whole batch whether a step is left out; PerpNeg projects the whole batch.
SAMPLE_BY_SAMPLE = {name: it for name, it in WORKFLOWS.items() if "Cache" not in name and "PerpNeg" not in name}


def channels(name: str) -> int:
    """Return the channels of every token: Fill's and Depth's models also get an image (and a mask)."""
    return {"Fill": 384, "Depth": 128}.get(name, 64)


def empty_latent(batch: int) -> Latent:
    return {"samples": torch.zeros(batch, 16, *SIZE)}

"""A LoRA for the emoji FLUX, trained on the dense model like LoRAs of FLUX.1: pictures like old sepia prints.

    python -m demo.lora --out demo/assets/loras/emoji-sepia-lora.safetensors

diffusers writes it, with its own (PEFT) key names. The example workflow flux-moe-lora and the tests load it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from d2m_model.hosts.diffusers import load_transformer
from demo import prompt_encoder
from demo.autoencoder import TinyAutoencoder
from demo.dataset import ASSETS, EMOJI_AUTOENCODER, EMOJI_TEACHER, SEPIA_LORA, Picture, random_picture, render
from demo.train import fast_on_cpu, patchify, predict_velocity, timesteps

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SEPIA = (1.0, 0.86, 0.65)
_RANK = 8
_TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|proj_mlp|proj_out)"
_GUIDANCE = 1.0  # the guidance of real data; more of it then strengthens what was learned
_SHIFT = 2.0  # the shift with which the model itself was trained


def sepia(image: Tensor) -> Tensor:
    """Return the brightness of an image [3, H, W] in 0..1 in shades of brown."""
    return torch.tensor(_LUMA) @ image.flatten(1) * torch.tensor(_SEPIA)[:, None]


def random_pictures(count: int, seed: int = 0) -> list[Picture]:
    generator = np.random.default_rng(seed)
    return [random_picture(generator) for _ in range(count)]


def train_lora(out: Path, *, steps: int, batch: int, learning_rate: float, examples: int) -> None:
    """Train the LoRA on `examples` sepia pictures and write it to `out`."""
    torch.manual_seed(0)
    transformer = load_transformer(EMOJI_TEACHER, torch.float32)
    encoder = prompt_encoder.load_prompt_encoder(ASSETS / "prompt-encoder.safetensors")
    autoencoder = TinyAutoencoder.load(EMOJI_AUTOENCODER)
    chosen = random_pictures(examples)
    images = torch.stack([sepia(image).view_as(image) for image in map(render, chosen)])
    latents = torch.cat([autoencoder.encode(part) for part in images.split(64)])
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_TARGETS))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    losses = []
    with fast_on_cpu():
        for step in range(steps):
            index = torch.randint(examples, (batch,))
            context, pooled = encoder.encode([chosen[i].caption() for i in index.tolist()])
            image = patchify(latents[index])
            t, noise = timesteps(batch, _SHIFT), torch.randn_like(image)
            noisy = torch.lerp(image, noise, t[:, None, None])
            flow = predict_velocity(transformer, noisy, t, context, pooled, torch.full((batch,), _GUIDANCE))
            loss = (flow.float() - (noise - image)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
            if (step + 1) % 20 == 0:
                print(json.dumps({"step": step + 1, "loss": round(float(np.mean(losses[-20:])), 4)}), flush=True)
    layers = {name: tensor.bfloat16().contiguous() for name, tensor in get_peft_model_state_dict(transformer).items()}
    FluxPipeline.save_lora_weights(str(out.parent), layers, weight_name=out.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SEPIA_LORA)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=512)
    arguments = parser.parse_args()
    train_lora(
        arguments.out,
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        examples=arguments.examples,
    )


if __name__ == "__main__":
    main()

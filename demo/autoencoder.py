"""Recipe step 2: an autoencoder with 16 channels and scale 1/8 in TAEF1's format, which the stock Load VAE opens.

    python -m demo.autoencoder --out runs/autoencoder

Architecture: diffusers' AutoencoderTiny (the TAESD of madebyollin); file: `taesd_encoder.*`, `taesd_decoder.*`,
`vae_scale`, `vae_shift`. The latents that a FLUX sees (`(latent - 0.1159) * 0.3611`) have mean 0 and standard deviation 1.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from demo.dataset import random_picture, render

_FLUX_SCALE, _FLUX_SHIFT = 0.3611, 0.1159  # FLUX.1's latent format
_CROP = 64  # pixels
_LATENT_NOISE = 0.03  # in standard deviations of a latent: the decoder must forgive a sampler that much


def _new_tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=(64,) * 4, decoder_block_out_channels=(64,) * 4
    )


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in 0..1, from the mean squared error over all of them."""
    return float(-10 * torch.log10((a - b).square().mean()))


class TinyAutoencoder:
    """Translates images [B, 3, H, W] in 0..1 to latents [B, 16, H/8, W/8] in FLUX's model space, and back."""

    def __init__(self, tiny: AutoencoderTiny, mean: float, std: float) -> None:
        self.tiny, self.mean, self.std = tiny.eval().requires_grad_(False), mean, std

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (self.tiny.encoder(images * 2 - 1) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (self.tiny.decoder(latents * self.std + self.mean) * 0.5 + 0.5).clamp(0, 1)

    def save(self, file: Path) -> None:
        """Write TAEF1's one-file layout, float16. `vae_scale` and `vae_shift` encode mean and std in FLUX's latent format."""
        tensors = {}
        for name, tensor in self.tiny.state_dict().items():
            side, index, rest = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
            shift = 1 if side == "decoder" else 0  # TAESD's decoder counts its clamp as layer 0
            tensors[f"taesd_{side}.{int(index) + shift}.{rest}"] = tensor.half().contiguous()
        tensors["vae_scale"] = torch.tensor(_FLUX_SCALE * self.std)
        tensors["vae_shift"] = torch.tensor(_FLUX_SHIFT - self.mean / (_FLUX_SCALE * self.std))
        save_file(
            tensors,
            file,
            metadata={"modelspec.title": "Emoji FLUX autoencoder", "modelspec.license": "Apache-2.0"},
        )

    @classmethod
    def load(cls, file: Path) -> TinyAutoencoder:
        tensors = load_file(file)
        std = float(tensors.pop("vae_scale")) / _FLUX_SCALE
        mean = (_FLUX_SHIFT - float(tensors.pop("vae_shift"))) * _FLUX_SCALE * std
        state = {}
        for name, tensor in tensors.items():
            side, index, rest = re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
            state[f"{side}.layers.{int(index) - (side == 'decoder')}.{rest}"] = tensor.float()
        tiny = _new_tiny()
        tiny.load_state_dict(state)
        return cls(tiny, mean, std)


def crops(generator: np.random.Generator, count: int) -> torch.Tensor:
    """Return parts of training pictures, [count, 3, 64, 64]; most of them show some of the object."""
    batch = []
    for _ in range(count):
        x, y = generator.integers(0, (128 - _CROP) // 2 + 1, 2) * 2
        batch.append(render(random_picture(generator))[:, y : y + _CROP, x : x + _CROP])
    return torch.stack(batch)


@torch.no_grad()
def held_out_psnr(tiny: AutoencoderTiny, count: int = 64) -> float:
    """Return the PSNR in dB of `count` renders whose (object, colour) pairs are held out of training."""
    generator = np.random.default_rng(7)
    images = torch.stack([render(random_picture(generator, training=False)) for _ in range(count)])
    restored = [tiny.decoder(tiny.encoder(part * 2 - 1)) * 0.5 + 0.5 for part in images.split(16)]
    return psnr(torch.cat(restored).clamp(0, 1), images)


def train_autoencoder(out: Path, *, steps: int, batch: int, learning_rate: float) -> None:
    """Train with plain MSE, one learning-rate cycle and bf16 autocast.

    Checkpoint and log are written under `out`, the finished file as out/autoencoder.safetensors.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    tiny = _new_tiny().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    start = time.time()
    with (out / "log.jsonl").open("a") as log:
        for step in range(1, steps + 1):
            images = crops(generator, batch).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                latents = tiny.encoder(images * 2 - 1)
                spread = latents.float()
                noisy = latents + _LATENT_NOISE * spread.std().detach() * torch.randn_like(latents)
                restored = tiny.decoder(noisy)
            mean, std = spread.mean((0, 2, 3)), spread.std((0, 2, 3))
            loss = (restored.float() * 0.5 + 0.5 - images).square().mean()
            # Keeps mean and spread of the channels alike: the file format has one scale and one shift for all.
            total = loss + 1e-4 * (mean.square() + (std - 1).square()).mean()
            total.backward()
            torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 100 == 0 or step == steps:
                row: dict[str, float] = {
                    "step": step,
                    "psnr_crops": -10 * float(loss.detach().log10()),
                    "seconds": time.time() - start,
                }
                row["latent_std_min"], row["latent_std_max"] = float(std.min()), float(std.max())
                if step % 500 == 0 or step == steps:
                    row["psnr_held_out"] = held_out_psnr(tiny)
                    torch.save(tiny.state_dict(), out / "checkpoint.pt")
                print(json.dumps(row), file=log, flush=True)
    images = torch.stack([render(random_picture(generator)) for _ in range(128)])
    with torch.no_grad():
        latents = torch.cat([tiny.encoder(part * 2 - 1) for part in images.split(16)])
    finished = TinyAutoencoder(tiny, float(latents.mean()), float(latents.std()))
    finished.save(out / "autoencoder.safetensors")
    quality = held_out_psnr(TinyAutoencoder.load(out / "autoencoder.safetensors").tiny)
    print(f"held-out PSNR {quality:.2f} dB, {time.time() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    train_autoencoder(
        arguments.out, steps=arguments.steps, batch=arguments.batch, learning_rate=arguments.learning_rate
    )

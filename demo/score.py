"""Score an emoji FLUX on the 500 fixed prompts, and draw a grid of its images.

    python -m demo.score demo/assets/diffusion_models/emoji-flux.safetensors --grid grid.png
    python -m demo.score --checkpoint runs/flux/flow-2000.pt --guidance 1

Prompts 0-449 name (object, colour) pairs that were seen in training, prompts 450-499 pairs that were held out.
Image i starts from seed i.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from demo import dataset
from demo.autoencoder import TinyAutoencoder
from demo.prompt_encoder import PromptEncoder, load_prompt_encoder
from demo.sample import sample_latents, save_grid
from demo.scorer import Scorer
from demo.train import Student, fast_on_cpu


def decode(latents: Tensor) -> Tensor:
    """Decode latents [N, 16, 16, 16] to images [N, 3, 128, 128] in 0..1."""
    autoencoder = TinyAutoencoder.load(dataset.EMOJI_AUTOENCODER)
    return torch.cat([autoencoder.decode(part) for part in latents.split(25)])


def load_for_scoring(file: Path | None, checkpoint: Path | None) -> tuple[nn.Module, PromptEncoder]:
    """Load transformer and prompt encoder: of an exported file, with the assets' encoder, or of a training checkpoint."""
    if checkpoint is not None:
        student = Student()
        student.load_state_dict(torch.load(checkpoint)["average"])
        return student.transformer, student.prompts
    if file is None:
        raise ValueError("Nothing to score: name a .safetensors file, or a training checkpoint with --checkpoint.")
    from d2m_model.hosts.diffusers import load_transformer

    encoder = load_prompt_encoder(dataset.ASSETS / "prompt-encoder.safetensors")
    return load_transformer(file, torch.float32), encoder


def score_by_pairs(images: Tensor, pictures: tuple[dataset.Picture, ...]) -> dict[str, dict[str, float]]:
    """Return the scores of all images, and separately those of seen and of held-out pairs."""
    scorer = Scorer()
    seen = [(p.object, p.colour) not in dataset.held_out() for p in pictures]
    scores = {"all": scorer.score(images, pictures)}
    for name, wanted in (("seen", True), ("held_out", False)):
        chosen = [index for index, value in enumerate(seen) if value == wanted]
        if chosen:
            scores[name] = scorer.score(images[chosen], [pictures[index] for index in chosen])
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="score only every n-th prompt")
    parser.add_argument("--grid", type=Path, help="file for a grid of 32 of the images")
    arguments = parser.parse_args()
    transformer, encoder = load_for_scoring(arguments.file, arguments.checkpoint)
    pictures = dataset.prompts()[:: arguments.every]
    seeds = range(0, len(dataset.prompts()), arguments.every)
    start = time.time()
    with torch.no_grad(), fast_on_cpu():
        latents = sample_latents(
            transformer.eval(),
            encoder,
            [picture.caption() for picture in pictures],
            steps=arguments.steps,
            guidance=arguments.guidance,
            seeds=seeds,
        )
    images = decode(latents)
    if arguments.grid:
        save_grid(images[: 32 * (len(images) // 32) : max(1, len(images) // 32)][:32], arguments.grid, columns=8)
    result: dict[str, object] = {"prompts": len(pictures), "steps": arguments.steps, "guidance": arguments.guidance}
    result |= {"scores": score_by_pairs(images, pictures), "seconds": round(time.time() - start, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

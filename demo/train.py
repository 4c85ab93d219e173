"""Recipe step 3: train the emoji FLUX (flow matching), then distil guidance into it, as in FLUX.1 dev.

    python -m demo.train flow     --out runs/flux --autoencoder runs/autoencoder/autoencoder.safetensors
    python -m demo.train guidance --out runs/flux
    python -m demo.train export   --out runs/flux

The model is diffusers' FluxTransformer2DModel; the export has BFL's key names. Both phases write a checkpoint every few
minutes, and continue from it when they are started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from einops import rearrange
from torch import Tensor, nn

from d2m_model.atomic import atomic_file
from demo import dataset, prompt_encoder
from demo.autoencoder import TinyAutoencoder
from demo.dataset import CAPTION_TEMPLATES, COLOURS, POSITIONS, Picture, every_training_picture, objects, render
from demo.muon import Muon
from demo.prompt_encoder import WIDTH, PromptEncoder, words_of

HIDDEN = 128
DOUBLE_BLOCKS, SINGLE_BLOCKS = 7, 14
GUIDANCE_RANGE = (1.0, 5.0)


@dataclass(kw_only=True, slots=True)
class PhaseSettings:
    """Settings of one phase of the training."""

    steps: int
    until: int  # step to stop at, as if interrupted
    batch: int
    learning_rate: float
    decay_steps: int  # number of last steps over which the learning rate falls to zero
    ema: float  # share of the weights' average that each step keeps
    checkpoint_every: int = 250
    snapshot_every: int = 1000
    warmup: int = 50
    prompt_dropout: float = 0.1
    shift: float = 2.0  # shift of the timestep distribution towards noise
    start: Path | None = None  # folder of an exported model to start from


def new_emoji_flux() -> FluxTransformer2DModel:
    """Make a FLUX.1 dev with hidden size 128. Modulations and output start at zero (DiT's adaLN-zero)."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=128,
        num_attention_heads=HIDDEN // 128,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (
            name.endswith("norm.linear") or ".norm1" in name or name.startswith("norm_out")
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def vocabulary() -> list[str]:
    """Return every word that a caption can have."""
    words = {word for name in (*objects(), *COLOURS, *POSITIONS, *CAPTION_TEMPLATES) for word in words_of(name)}
    return sorted(words - {"object", "position", "colour"})


def patchify(latents: Tensor) -> Tensor:
    """Turn latents into tokens of FLUX's 2 x 2 patches: [B, 16, 2h, 2w] -> [B, h*w, 64]."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpatchify(tokens: Tensor, height: int) -> Tensor:
    """Turn tokens back into latents, the inverse of patchify; `height` in tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


def image_ids(height: int, width: int) -> Tensor:
    """Return the rotary positions of image tokens, [h*w, 3]."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.flatten(0, 1)


def predict_velocity(
    transformer: nn.Module, tokens: Tensor, t: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor
) -> Tensor:
    """Return the velocity (noise - image) that the model predicts for square images; t and guidance are [B]."""
    side = round(tokens.shape[1] ** 0.5)
    return transformer(
        hidden_states=tokens,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        img_ids=image_ids(side, side),
        txt_ids=torch.zeros(context.shape[1], 3),
        return_dict=False,
    )[0]


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value


@contextlib.contextmanager
def fast_on_cpu() -> Iterator[None]:
    """Use bf16 autocast, and attention as two matrix products: with 76 tokens the CPU's flash kernel is slower."""
    functions = torch.nn.functional
    original = functions.scaled_dot_product_attention
    functions.scaled_dot_product_attention = _plain_attention
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # the weights change meanwhile
            yield
    finally:
        functions.scaled_dot_product_attention = original


@torch.no_grad()
def latent_cache(file: Path, autoencoder_file: Path) -> tuple[Tensor, list[Picture]]:
    """Return latents [N, 16, 16, 16], float16, and the pictures of every training combination; encode them once."""
    pictures = every_training_picture(np.random.default_rng(1))
    if not file.exists():
        autoencoder = TinyAutoencoder.load(autoencoder_file)
        autoencoder.tiny.to(memory_format=torch.channels_last)
        parts = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for start in range(0, len(pictures), 64):
                parts.append(autoencoder.encode(torch.stack([render(p) for p in pictures[start : start + 64]])).half())
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as part:
            torch.save(torch.cat(parts), part)
    return torch.load(file), pictures


def optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for all other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = "transformer_blocks." in name and "norm" not in name
        (matrices if in_block and parameter.ndim == 2 else others).append(parameter)
    return [
        Muon(matrices, lr=learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


class Student(nn.Module):
    """Transformer and prompt encoder, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = new_emoji_flux()
        self.prompts = PromptEncoder(vocabulary())

    def start_from(self, assets: Path) -> None:
        """Load the weights of an exported emoji FLUX and of its prompt encoder."""
        from d2m_model.hosts.diffusers import load_transformer

        self.transformer.load_state_dict(
            load_transformer(assets / "diffusion_models" / "emoji-flux.safetensors", torch.float32).state_dict()
        )
        self.prompts.load_state_dict(
            prompt_encoder.load_prompt_encoder(assets / "prompt-encoder.safetensors").state_dict()
        )


def learning_rate_at(step: int, settings: PhaseSettings) -> float:
    """Return the learning rate of a step: warm-up, constant, then a fall to zero over the last `decay_steps`."""
    left = (settings.steps - step) / max(1, settings.decay_steps)
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup, left)


def timesteps(count: int, shift: float) -> Tensor:
    """Draw timesteps from a logit-normal distribution in (0, 1), shifted towards noise as FLUX does for large images."""
    t = torch.sigmoid(torch.randn(count))
    return shift * t / (1 + (shift - 1) * t)


def train_phase(phase: str, out: Path, settings: PhaseSettings, autoencoder_file: Path) -> None:
    """Run a phase, from its last checkpoint if it has one.

    `flow` learns from data, `guidance` from the flow model under classifier-free guidance.
    """
    torch.manual_seed(0)
    student, average = Student(), Student()
    optimizer_list = optimizers(student, settings.learning_rate)
    checkpoint, first_step = out / f"{phase}.pt", 0
    if phase == "guidance":
        teacher = Student()
        state = torch.load(out / "flow.pt")["average"]
        for model in (student, average, teacher):
            model.load_state_dict(state)
        teacher.requires_grad_(False)
    elif settings.start is not None:
        student.start_from(settings.start)
    average.load_state_dict(student.state_dict())
    average.requires_grad_(False)
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        student.load_state_dict(saved["student"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizer_list, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step = saved["step"]
    latents, pictures = latent_cache(out / "latents.pt", autoencoder_file)
    generator = np.random.default_rng((len(phase), first_step))
    torch.manual_seed(first_step)
    start, losses = time.time(), []
    with contextlib.ExitStack() as stack, (out / f"{phase}.jsonl").open("a") as log:
        stack.enter_context(fast_on_cpu())
        student.transformer.compile_repeated_blocks()
        if phase == "guidance":
            teacher.transformer.compile_repeated_blocks()
        for step in range(first_step, settings.until):
            chosen = generator.integers(len(pictures), size=settings.batch)
            captions = [pictures[i].caption(int(generator.integers(len(CAPTION_TEMPLATES)))) for i in chosen]
            words = student.prompts.tokens(captions)
            image = patchify(latents[torch.from_numpy(chosen)].float())
            t, noise = timesteps(settings.batch, settings.shift), torch.randn_like(image)
            noisy = torch.lerp(image, noise, t[:, None, None])
            if phase == "flow":
                words = words * (torch.rand(settings.batch, 1) >= settings.prompt_dropout)
                guidance, target = torch.ones(settings.batch), noise - image
            else:
                guidance = torch.empty(settings.batch).uniform_(*GUIDANCE_RANGE)
                target = guided(teacher, noisy, t, words, guidance)
            context, pooled = student.prompts(words)
            prediction = predict_velocity(student.transformer, noisy, t, context, pooled, guidance)
            loss = (prediction.float() - target).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for optimizer in optimizer_list:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, settings)
                optimizer.step()
                optimizer.zero_grad()
            keep = min(settings.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - keep)
            losses.append(float(loss.detach()))
            if (step + 1) % 50 == 0:
                row = {
                    "step": step + 1,
                    "loss": float(np.mean(losses)),
                    "seconds": round(time.time() - start, 1),
                }
                print(json.dumps(row), file=log, flush=True)
                losses.clear()
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.until:
                saved = {"step": step + 1, "student": student.state_dict(), "average": average.state_dict()}
                saved["optimizers"] = [optimizer.state_dict() for optimizer in optimizer_list]
                with atomic_file(checkpoint) as part:
                    torch.save(saved, part)
            if (step + 1) % settings.snapshot_every == 0:  # for the curve of scores over training
                torch.save({"average": average.state_dict()}, out / f"{phase}-{step + 1}.pt")


@torch.no_grad()
def guided(teacher: Student, noisy: Tensor, t: Tensor, words: Tensor, guidance: Tensor) -> Tensor:
    """Return the teacher's velocity under classifier-free guidance, uncond + g (cond - uncond), per sample."""
    context, pooled = teacher.prompts(torch.cat([words, torch.zeros_like(words)]))
    flow = predict_velocity(
        teacher.transformer, noisy.repeat(2, 1, 1), t.repeat(2), context, pooled, torch.ones(len(pooled))
    )
    conditional, unconditional = flow.float().chunk(2)
    return torch.lerp(unconditional, conditional, guidance[:, None, None])


def export_assets(out: Path, phase: str, assets: Path) -> None:
    """Write the averaged weights: emoji-flux.safetensors (bf16, BFL keys) and prompt-encoder.safetensors (fp16)."""
    from safetensors.torch import save_file

    from d2m_model.hosts.diffusers import state_dict_to_bfl

    student = Student()
    student.load_state_dict(torch.load(out / f"{phase}.pt")["average"])
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in state_dict_to_bfl(student.transformer).items()}
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "Emoji FLUX",
        "modelspec.architecture": "Flux.1-dev",
        "modelspec.license": "Apache-2.0",
        "modelspec.description": "A small FLUX.1 trained on Noto Color Emoji at 128 x 128; see demo/README.md.",
    }
    save_file(tensors, assets / "diffusion_models" / "emoji-flux.safetensors", metadata=metadata)
    student.prompts.save(assets / "prompt-encoder.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("flow", "guidance", "export"))
    parser.add_argument("--out", type=Path, default=Path("runs/flux"))
    parser.add_argument("--assets", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--autoencoder", type=Path, default=dataset.EMOJI_AUTOENCODER)
    parser.add_argument("--steps", type=int, help="step at which the learning rate has fallen to zero")
    parser.add_argument("--until", type=int, help="stop after this step (default: --steps)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--decay-steps", type=int)
    parser.add_argument("--start", type=Path, help="folder of an exported model from which `flow` starts")
    parser.add_argument("--from-phase", default="guidance", help="phase whose checkpoint `export` writes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.phase == "export":
        return export_assets(arguments.out, arguments.from_phase, arguments.assets)
    flow = arguments.phase == "flow"
    steps, rate, decay = (3700, 2e-3, 1300) if flow else (250, 1e-3, 200)
    settings = PhaseSettings(
        steps=arguments.steps or steps,
        until=arguments.until or arguments.steps or steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate or rate,
        decay_steps=decay if arguments.decay_steps is None else arguments.decay_steps,
        ema=0.998 if flow else 0.98,
        start=arguments.start,
    )
    train_phase(arguments.phase, arguments.out, settings, arguments.autoencoder)


if __name__ == "__main__":
    main()

"""Draw what blocks and experts of a FLUX do while it samples, as in the paper's figures.

blocks   Fig. 3: how much each block changes its input, by prompt and timestep; usually of a dense FLUX
experts  Fig. 6: how often a FLUX-MoE selects each expert, by prompt category, timestep and token
top-k    Fig. 8: images with k = 0, 1, 2, 4 experts from the same noise, and the teacher's

Each writes a PNG to OUT, and its numbers as JSON beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from d2m_model.atomic import atomic_file
from d2m_model.blocks import BLOCK_KINDS, FFN, Block, blocks_of
from d2m_model.mob import BlockRouting
from d2m_model.moe import MoEFFN
from d2m_model.routers import Routing

from .. import UserError
from ..data.batch import Batch
from ..distillation.features import find_block
from ..evaluation import figures
from ..evaluation.open_model import is_flux_moe, load_flux
from ..evaluation.prompts import (
    Encoders,
    Prompt,
    add_prompt_arguments,
    add_sampling_arguments,
    check_counts,
    model_dtype,
    open_encoders,
    read_prompts,
    sampling_shift,
)
from ..evaluation.scores import distances, interval
from ..flow.noise import channels_of, grid, trajectory
from ..flow.sampling import draw_grid, noise_for, sample, save_png
from ..flow.velocity import evaluating
from ..progress import progress_bar

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

_PROMPTS = {"blocks": 32, "experts": 64, "top-k": 8}  # at most, evenly spread, unless --every is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a dense FLUX or a FLUX-MoE")
    parser.add_argument("--what", required=True, choices=tuple(_PROMPTS))
    parser.add_argument("--out", type=Path, metavar="OUT", help="a folder (default: runs/analysis/<name of FILE>)")
    parser.add_argument(
        "--categories", metavar="FIELD",
        help="experts: field of the prompts' metadata to sort by (default: colour for emoji, else tag)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", metavar="LIST",
        help="experts: names of FFNs, comma-separated (default: the image FFN of the 5th double block, the 5th single block)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", default="0,1,2,4", metavar="LIST", help="top-k: comma-separated numbers (default: 0,1,2,4)"
    )
    parser.add_argument("--teacher", type=Path, metavar="F", help="top-k: the dense FLUX to compare with")
    add_prompt_arguments(parser)
    add_sampling_arguments(parser)
    parser.set_defaults(every=None)


def run(args: argparse.Namespace) -> int:
    check_counts(args, "steps", "batch", "text_tokens", *(["every"] if args.every is not None else []))
    out = args.out or Path("runs/analysis") / args.file.stem
    prompts = read_prompts(args.data)
    prompts = prompts[:: args.every or -(-len(prompts) // _PROMPTS[args.what])]
    draw = {"blocks": draw_blocks, "experts": draw_experts, "top-k": draw_top_k}[args.what]
    numbers = draw(args, out, prompts, open_encoders(args))
    with atomic_file(out / f"{args.what}.json") as part:
        part.write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{out / args.what}.png: {len(prompts)} prompts, {args.steps} steps; the numbers are in {args.what}.json.")
    return 0


# Fig. 3


def draw_blocks(args: argparse.Namespace, out: Path, prompts: Sequence[Prompt], encoders: Encoders) -> dict[str, Any]:
    """Draw blocks.png and return its numbers."""
    model = load_flux(args.file, model_dtype(args), args.device)
    names = [block.name for block in blocks_of(model)]
    change = np.zeros((len(prompts), args.steps, len(names)))
    for walk in walks(args, model, prompts, encoders):
        for place, name in enumerate(names):

            def hook(
                _: nn.Module, arguments: Any, keywords: Any, output: Any, place: int = place, walk: Walk = walk
            ) -> None:
                given = [_argument(arguments, keywords, 0, "hidden_states")]
                given.append(_argument(arguments, keywords, 1, "encoder_hidden_states"))
                text, image = output
                change[walk.some, walk.step, place] = mean_square_change((image, text), given).cpu()

            walk.handles.append(find_block(model, name).register_forward_hook(hook, with_kwargs=True))
        walk.go()
    by_prompt, by_timestep = change.mean(1), change.mean(0)
    title = f"How much blocks of {args.file.name} change their input"
    figures.save_figure(figures.block_change(by_prompt, by_timestep, names, title), out / "blocks.png")
    return {
        "file": str(args.file),
        "blocks": names,
        "mean": change.mean((0, 1)).tolist(),
        "prompts": [prompt.text for prompt in prompts],
        "by_prompt": by_prompt.tolist(),
        "by_timestep": by_timestep.tolist(),
    }


def mean_square_change(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Mean square [B] of output - input over all tokens of both streams, which are [B, T, H]."""
    squares = [(o.float() - i.float()).square().sum((1, 2)) for o, i in zip(outputs, inputs, strict=True)]
    return torch.stack(squares).sum(0) / sum(output[0].numel() for output in outputs)


def _argument(arguments: Any, keywords: Any, place: int, name: str) -> Tensor:
    found: Tensor = keywords[name] if name in keywords else arguments[place]
    return found


# Fig. 6


def draw_experts(args: argparse.Namespace, out: Path, prompts: Sequence[Prompt], encoders: Encoders) -> dict[str, Any]:
    """Draw experts.png and return its numbers: how often a token gets each expert, where its block runs. Rows sum to k."""
    if not is_flux_moe(args.file):
        raise UserError(f"{args.file} is a dense FLUX; --what experts needs a FLUX-MoE.")
    fields = args.categories or ("colour" if args.data == "emoji" else "tag")
    prompts = sorted(prompts, key=lambda prompt: str(prompt.metadata.get(fields, "")))
    model: FluxMoETransformer2DModel = load_flux(args.file, model_dtype(args), args.device)
    layers = chosen_layers(model, args.layers)
    chosen: dict[str, np.ndarray] = {}  # [prompts, steps, tokens, E]
    ran = {name: np.ones((len(prompts), args.steps), bool) for name in layers}
    for walk in walks(args, model, prompts, encoders):
        for name in layers:
            _watch_experts(model, name, walk, chosen, ran[name])
        with evaluating(model, every_block=True):  # blocks see all samples; `ran` has who chose them
            walk.go()
    maps = {name: frequencies(chosen[name], ran[name]) for name in layers}
    words = len(encoders.batch([prompts[0].text], args.guidance).text_ids_L3)
    text_tokens = {name: 0 if FFN.parse(name).stream == "img" else words for name in layers}
    categories = [str(prompt.metadata.get(fields, "")) for prompt in prompts]
    title = f"Experts selected in {args.file.name}"
    figures.save_figure(figures.expert_selection(maps, categories, text_tokens, title), out / "experts.png")
    return {
        "file": str(args.file),
        "categories_by": fields,
        "categories": categories,
        "prompts": [prompt.text for prompt in prompts],
        "text_tokens": text_tokens,
        "layers": {name: {what: _plain(of) for what, of in own.items()} for name, own in maps.items()},
    }


def _watch_experts(
    model: FluxMoETransformer2DModel, name: str, walk: Walk, chosen: dict[str, np.ndarray], ran: np.ndarray
) -> None:
    """Record which experts a layer selects during the walk, and for which prompts its block, if grouped, is chosen."""

    def route(moe: MoEFFN, arguments: tuple[Tensor]) -> None:
        x_BTH = arguments[0]
        found = selected(moe.route(x_BTH.flatten(0, 1))).unflatten(0, x_BTH.shape[:2]).cpu().numpy()
        if name not in chosen:
            chosen[name] = np.zeros((*ran.shape, *found.shape[1:]), bool)
        chosen[name][walk.some, walk.step] = found

    walk.handles.append(model.moe_ffns()[name].register_forward_pre_hook(route))
    member = getattr(find_block(model, name), "member", None)
    if member is not None:

        def choose(_: nn.Module, arguments: Any, routing: BlockRouting) -> None:
            ran[walk.some, walk.step] = routing.chosen_BM[:, member.position].cpu().numpy()

        walk.handles.append(model.block_groups[member.group].register_forward_hook(choose))


def frequencies(chosen: np.ndarray, ran: np.ndarray) -> dict[str, np.ndarray]:
    """Return how often tokens get each expert, by prompt, timestep and token; NaN where the layer never ran.

    `chosen` is [prompts, steps, tokens, E], `ran` [prompts, steps].
    """
    counted, tokens = (chosen & ran[..., None, None]).astype(np.float32), chosen.shape[2]
    with np.errstate(invalid="ignore"):
        return {
            "prompt": counted.sum((1, 2)) / (ran.sum(1) * tokens)[:, None],
            "timestep": counted.sum((0, 2)) / (ran.sum(0) * tokens)[:, None],
            "token": counted.sum((0, 1)) / ran.sum(),
        }


def selected(routing: Routing) -> Tensor:
    """Return which experts each token goes to, bool [T, E], however small their weights."""
    none_TE = torch.zeros_like(routing.logits_TE, dtype=torch.bool)
    return none_TE.index_put((routing.token_A, routing.expert_A), torch.ones_like(routing.gate_A, dtype=torch.bool))


def _plain(values: np.ndarray) -> list[list[float | None]]:
    """Convert to lists for JSON, which has no NaN."""
    return [[None if np.isnan(value) else round(float(value), 6) for value in row] for row in values]


def chosen_layers(model: FluxMoETransformer2DModel, names: str | None) -> list[str]:
    """Return the named layers, or the paper's: image FFN of the 5th (or last) converted double block, and single block."""
    known = list(model.moe_ffns())
    if names is not None:
        asked = names.split(",")
        for name in asked:
            if name not in known:
                raise UserError(f"--layers: {name} is not a MoE FFN of this file; it has {known[0]} … {known[-1]}.")
        return asked
    found = []
    for kind in BLOCK_KINDS:
        own = [name for name in known if (ffn := FFN.parse(name)).block.kind == kind and ffn.stream != "txt"]
        fifth = Block(kind, 4).ffns[0].name
        found += [fifth] if fifth in own else own[-1:]
    return found


# Fig. 8


def draw_top_k(args: argparse.Namespace, out: Path, prompts: Sequence[Prompt], encoders: Encoders) -> dict[str, Any]:
    """Draw top-k.png, a row per k and a column per prompt. Return its numbers: distances to the teacher."""
    if not is_flux_moe(args.file):
        raise UserError(f"{args.file} is a dense FLUX; --what top-k needs a FLUX-MoE.")
    try:
        ks = [int(k) for k in args.top_k.split(",")]
    except ValueError:
        raise UserError(f"--top-k is {args.top_k!r}; expected comma-separated numbers, such as 0,1,2,4.") from None
    asked = encoders.batch([prompt.text for prompt in prompts], args.guidance)
    model: FluxMoETransformer2DModel = load_flux(args.file, model_dtype(args), args.device)
    router = model.flux_moe.router
    if router.setting != "top_k":
        raise UserError(f"{args.file} has {router.named}, which has no top-k.")
    tokens: dict[str, Tensor] = {}
    for k in ks:
        try:
            model.set_top_k(k)
        except ValueError as error:
            raise UserError(f"--top-k: {error}") from None
        tokens[f"k = {k}"] = _sampled(args, model, asked, prompts, encoders)
    if args.teacher is not None:
        del model
        teacher = load_flux(args.teacher, model_dtype(args), args.device)
        tokens = {"teacher": _sampled(args, teacher, asked, prompts, encoders), **tokens}
    rows = {name: encoders.images(found, asked.image_ids_T3) for name, found in tokens.items()}
    save_png(draw_grid(rows, [prompt.text for prompt in prompts]), out / "top-k.png")
    numbers: dict[str, Any] = {"file": str(args.file), "prompts": [prompt.text for prompt in prompts], "top_k": ks}
    if "teacher" in tokens:
        numbers["teacher_distance"] = {
            str(k): interval(distances(tokens[f"k = {k}"], tokens["teacher"])).as_dict() for k in ks
        }
    return numbers


def _sampled(
    args: argparse.Namespace, model: FluxTransformer2DModel, asked: Batch, prompts: Sequence[Prompt], encoders: Encoders
) -> Tensor:
    noise_BTC = noise_for([args.seed + prompt.index for prompt in prompts], asked.image_ids_T3, channels_of(model))
    mu = sampling_shift(args, encoders, bool(model.config.guidance_embeds))
    return sample(model, asked, noise_BTC, steps=args.steps, mu=mu, size=args.batch)


# Sampling with hooks


@dataclass(kw_only=True, slots=True)
class Walk:
    """Sampling of some prompts. Hooks in `handles` can read `some`, the prompts' slice, and `step`; `go` removes them."""

    model: FluxTransformer2DModel
    batch: Batch
    noise_BTC: Tensor
    levels: Tensor
    some: slice
    step: int
    handles: list[Any]

    def go(self) -> None:
        sample_BTC = self.noise_BTC
        try:
            for step in range(len(self.levels) - 1):
                self.step = step
                sample_BTC = trajectory(self.model, self.batch, sample_BTC, self.levels[step : step + 2])
        finally:
            for handle in self.handles:
                handle.remove()


def walks(
    args: argparse.Namespace, model: FluxTransformer2DModel, prompts: Sequence[Prompt], encoders: Encoders
) -> Iterator[Walk]:
    """Yield the walks of all prompts, a batch of prompts at a time."""
    levels = grid(args.steps, sampling_shift(args, encoders, bool(model.config.guidance_embeds)))
    for start in progress_bar(range(0, len(prompts), args.batch), desc=f"{args.what}: {args.file.name}"):
        some = prompts[start : start + args.batch]
        batch = encoders.batch([prompt.text for prompt in some], args.guidance)
        noise_BTC = noise_for([args.seed + prompt.index for prompt in some], batch.image_ids_T3, channels_of(model))
        yield Walk(
            model=model,
            batch=batch,
            noise_BTC=noise_BTC,
            levels=levels,
            some=slice(start, start + len(some)),
            step=0,
            handles=[],
        )

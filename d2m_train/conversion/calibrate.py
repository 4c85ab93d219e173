"""Calibration: what a conversion without training wants to know of the dense model.

Neurons' importance (Eq. 6), some of every FFN's inputs, conditioning vectors, and what every block does to its input
(Fig. 3), gathered batch by batch. Each batch is a file of its own, written whole or not at all, so that an interrupted
calibration goes on where it stopped and ends as if it had not been.

Shapes: B batch, T image tokens, L text tokens, C channels of a token, H hidden size, N neurons, n samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2m_model.blocks import FFN, blocks_of
from d2m_model.config import FluxDims
from d2m_model.conversion.calibration import GUIDANCE, VECS_PER_SAMPLE, Calibration, metadata_of, write_part
from d2m_model.conversion.importance import TaylorImportance
from d2m_model.conversion.split import generator_for
from d2m_model.mob import mean_tokens
from d2m_model.tensor_file import CheckpointError

from .. import UserError
from ..data.batch import Batch, DataSource, check_fits
from ..flow.velocity import noised, velocity

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

FORMAT = 2  # of a batch file: another one is another calibration


@dataclass(kw_only=True, slots=True, frozen=True)
class CalibrationSettings:
    """`tokens`: inputs kept of every FFN, in all. `taylor`: measure importance, which takes a backward pass."""

    batches: int
    batch_size: int
    tokens: int
    taylor: bool
    seed: int


def calibrate(
    load_model: Callable[[], FluxTransformer2DModel],
    dims: FluxDims,
    ffns: Sequence[str],
    data: DataSource,
    settings: CalibrationSettings,
    folder: Path,
    teacher: str,
    progress: Callable[[float], object] = lambda loss: None,
) -> Calibration:
    """Gather what is missing in `folder`. The model is loaded only if anything is; its parameters are frozen.

    `teacher` identifies the teacher; `progress` hears each batch's loss. Raises UserError if the data do not fit, or if
    the folder holds another calibration.
    """
    identity = {"format": FORMAT, "teacher": teacher, "data": data.identity, "ffns": len(ffns), **asdict(settings)}
    files = [folder / f"batch-{index:05}.safetensors" for index in range(settings.batches)]
    missing = [index for index, file in enumerate(files) if not _is_ours(file, identity)]
    for index in sorted(set(range(len(files))) - set(missing)):
        progress(metadata_of(files[index])["loss"])
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror or error}); name another with --calibration."
            ) from None
        recorder = Recorder(load_model(), dims, ffns, settings)
        for index in missing:
            batch = data.batch(index, settings.batch_size, settings.seed)
            check_fits(batch, dims)
            tensors, loss = recorder.record(index, batch)
            write_part(files[index], tensors, {"identity": identity, "loss": loss})
            progress(loss)
    return Calibration(files)


def _is_ours(file: Path, identity: dict[str, object]) -> bool:
    """Whether this batch is there. Raises UserError if it is another calibration's."""
    if not file.exists():
        return False
    try:
        found = metadata_of(file).get("identity")
    except CheckpointError:
        return False  # damaged: made again
    if found == identity:
        return True
    differs = [key for key in identity if not isinstance(found, dict) or found.get(key) != identity[key]]
    raise UserError(
        f"{file.parent} holds another calibration: {', '.join(differs)} differ. Give the same options to go on with it, "
        "name another folder with --calibration, or delete this one."
    )


class Recorder:
    """Runs batches through a dense FLUX and keeps what the conversion needs of each."""

    def __init__(
        self, model: FluxTransformer2DModel, dims: FluxDims, ffns: Sequence[str], settings: CalibrationSettings
    ) -> None:
        from d2m_model.hosts.diffusers import ffn_linears

        self.model, self.dims, self.settings = model.requires_grad_(False), dims, settings
        self.linears = [entry for entry in ffn_linears(model) if entry[0] in set(ffns)]
        total = settings.batches * settings.batch_size
        generator = generator_for(settings.seed, "noise levels")
        # Stratified: each of all the samples has its own slice of 0..1.
        self.levels = (torch.randperm(total, generator=generator) + torch.rand(total, generator=generator)) / total

    def record(self, index: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """The tensors of batch number `index`, on the CPU, and its loss."""
        generator = generator_for(self.settings.seed, f"batch {index}")
        t_B = self.levels[index * self.settings.batch_size :][: self.settings.batch_size]
        batch = self._with_images(batch, generator)
        taylor = TaylorImportance.of(self.model, self.linears) if self.settings.taylor else None
        with (
            torch.set_grad_enabled(taylor is not None),
            self._inputs(batch, generator) as inputs,
            self._blocks() as blocks,
        ):
            loss = flow_matching_loss(self.model, batch, t_B, generator)
            if taylor is not None:
                loss.backward()
        tensors = {f"inputs.{name}": tensor for name, tensor in inputs.items()} | blocks
        if taylor is not None:
            tensors |= {f"importance.{name}": tensor for name, tensor in taylor.close().items()}
        tensors["silu_vec"] = self._silu_vecs(batch, generator)
        return tensors, float(loss.detach())

    def _with_images(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch; if it is prompts only, with the teacher's own images of them."""
        if batch.tokens_BTC is not None:
            return batch
        from ..flow.noise import grid, shift_of, trajectory
        from ..run_config import TimestepsSection

        section, count, length = TimestepsSection(), len(batch.pooled_BV), len(batch.image_ids_T3)
        noise_BTC = torch.randn(count, length, self.dims.out_channels, generator=generator)
        levels = grid(section.grid_steps, shift_of(length, section))
        return replace(batch, tokens_BTC=trajectory(self.model, batch, noise_BTC, levels).cpu())

    @contextmanager
    def _inputs(self, batch: Batch, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Some inputs of every FFN during the `with`, chosen at random from image tokens and words."""
        count = -(-self.settings.tokens // self.settings.batches)
        words = batch.words_BL
        both = torch.cat([words, torch.ones(batch.images().shape[:2], dtype=torch.bool)], 1)
        kept: dict[str, Tensor] = {}

        def watch(name: str, up: torch.nn.Linear) -> torch.utils.hooks.RemovableHandle:
            def hook(_: torch.nn.Module, arguments: tuple[Tensor]) -> None:
                if name in kept:
                    return  # computed again for the backward pass, under gradient checkpointing
                x = arguments[0].detach().flatten(0, 1)
                if (stream := FFN.parse(name).stream) != "img":
                    x = x[(words if stream == "txt" else both).flatten().to(x.device)]
                chosen = torch.randperm(len(x), generator=generator)[:count]
                kept[name] = x[chosen.to(x.device)].cpu()

            return up.register_forward_pre_hook(hook)

        handles = [watch(name, up) for name, up, _, _ in self.linears]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _blocks(self) -> Iterator[dict[str, Tensor]]:
        """Of every block during the `with`, float32: `mean` [B, H] of its input's tokens; `change` [B, 2], the mean squares
        of output - input over all tokens and over those of the image; and `vec` [B, H], which all of them get."""
        kept: dict[str, Tensor] = {}

        def watch(name: str, block: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
            takes = list(inspect.signature(block.forward).parameters)

            @torch.no_grad()
            def hook(_: torch.nn.Module, arguments: tuple, keywords: dict, found: tuple[Tensor, Tensor]) -> None:
                if f"mean.{name}" in kept:
                    return  # computed again for the backward pass, under gradient checkpointing
                given = dict(zip(takes, arguments, strict=False)) | keywords
                # diffusers' blocks give text before image.
                x = text, image = given["encoder_hidden_states"], given["hidden_states"]
                text_BT, image_BT = ((new - old).float().square().mean(2) for old, new in zip(x, found, strict=True))
                both_B = torch.cat([text_BT, image_BT], 1).mean(1)
                kept[f"mean.{name}"] = mean_tokens(text, image).cpu()
                kept[f"change.{name}"] = torch.stack([both_B, image_BT.mean(1)], 1).cpu()
                kept["vec"] = given["temb"].float().cpu()

            return block.register_forward_hook(hook, with_kwargs=True)

        handles = [watch(block.name, module) for block, module in blocks_of(self.model).items()]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _silu_vecs(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """[n, H]: the batch's pooled texts under other timesteps and guidances."""
        pooled_nV = batch.pooled_BV.repeat_interleave(VECS_PER_SAMPLE, 0)
        place = {"device": self.model.device, "dtype": self.model.dtype}
        t_n = torch.rand(len(pooled_nV), generator=generator)
        conditions = [1000 * t_n]
        if self.dims.guidance_embed:
            low, high = GUIDANCE
            conditions.append(1000 * (low + (high - low) * torch.rand(len(pooled_nV), generator=generator)))
        vec_nH = self.model.time_text_embed(*(c.to(**place) for c in conditions), pooled_nV.to(**place))
        return torch.nn.functional.silu(vec_nH.float()).cpu()


def flow_matching_loss(model: FluxTransformer2DModel, batch: Batch, t_B: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the model's velocity against noise - image, at noise levels t in 0..1."""
    images_BTC = batch.images()
    noise_BTC = torch.randn(images_BTC.shape, generator=generator)
    noisy_BTC = noised(images_BTC, noise_BTC, t_B)
    found_BTC = velocity(model, batch, noisy_BTC, t_B, batch.guidance_B, model.config.guidance_embeds)
    return (found_BTC.float() - (noise_BTC - images_BTC).to(found_BTC.device)).square().mean()

"""Calibration of a conversion without training: runs batches through the dense model and records what it needs.

Recorded are neurons' importance (Eq. 6), some inputs of every FFN, conditioning vectors, and how every block changes its
input (Fig. 3). Each batch is a file of its own, written atomically, so that an interrupted calibration goes on where it
stopped and gives the same result.

Shapes: B batch, T image tokens, L text tokens, C channels of a token, H hidden size, V pooled width, n samples.
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

from d2m_model.blocks import BFL_BLOCKS, FFN, blocks_of
from d2m_model.config import FluxDims
from d2m_model.conversion.calibration import Calibration, part_metadata, write_part
from d2m_model.conversion.importance import TaylorImportance
from d2m_model.conversion.recorder import Recorder
from d2m_model.conversion.split import generator_for
from d2m_model.tensor_file import CheckpointError

from .. import UserError
from ..data.batch import Batch, DataSource, check_fits
from ..flow.velocity import noised, velocity

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_FORMAT = 2  # of a batch file; files of another format count as another calibration


@dataclass(kw_only=True, slots=True, frozen=True)
class CalibrationBatches:
    """Batches of a calibration.

    tokens  inputs kept of every FFN, over all batches
    taylor  measure Taylor importance, which takes a backward pass
    streams keep tokens of every block's streams, which stand-ins are fitted to
    """

    batches: int
    batch_size: int
    tokens: int
    taylor: bool
    seed: int
    streams: bool = False


def calibrate_on_batches(
    load_model: Callable[[], FluxTransformer2DModel],
    dims: FluxDims,
    ffns: Sequence[str],
    data: DataSource,
    settings: CalibrationBatches,
    folder: Path,
    teacher: str,
    progress: Callable[[float], object] = lambda loss: None,
) -> Calibration:
    """Record the batches that are missing in `folder`. The model is loaded only if there are any; it is frozen.

    `teacher` identifies the teacher; `progress` gets each batch's loss. Raises UserError if the data do not fit, or if
    the folder holds another calibration.
    """
    identity = {"format": _FORMAT, "teacher": teacher, "data": data.identity, "ffns": len(ffns), **asdict(settings)}
    files = [folder / f"batch-{index:05}.safetensors" for index in range(settings.batches)]
    missing = [index for index, file in enumerate(files) if not _is_whole(file, identity)]
    for index in sorted(set(range(len(files))) - set(missing)):
        progress(part_metadata(files[index])["loss"])
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror or error}); name another with --calibration."
            ) from None
        batches = BatchRecorder(load_model(), dims, ffns, settings)
        for index in missing:
            batch = data.batch(index, settings.batch_size, settings.seed)
            check_fits(batch, dims)
            tensors, loss = batches.record(index, batch)
            write_part(files[index], tensors, {"identity": identity, "loss": loss})
            progress(loss)
    return Calibration(files)


def _is_whole(file: Path, identity: dict[str, object]) -> bool:
    """Return whether this batch has been recorded, with streams if these are asked for. Raises UserError if it belongs to
    another calibration."""
    if not file.exists():
        return False
    try:
        stored = part_metadata(file).get("identity")
    except CheckpointError:
        return False  # damaged: recorded again
    if isinstance(stored, dict) and stored | {"streams": identity["streams"]} == identity:
        return not identity["streams"] or stored.get("streams", False) is True
    differs = [key for key in identity if not isinstance(stored, dict) or stored.get(key) != identity[key]]
    raise UserError(
        f"{file.parent} holds another calibration: {', '.join(differs)} differ. Give the same options to go on with it, "
        "name another folder with --calibration, or delete this one."
    )


class BatchRecorder:
    """Runs batches through a dense FLUX in diffusers and feeds a Recorder by hooks."""

    def __init__(
        self, model: FluxTransformer2DModel, dims: FluxDims, ffns: Sequence[str], settings: CalibrationBatches
    ) -> None:
        from d2m_model.hosts.diffusers import ffn_linears

        self.model, self.dims, self.settings = model.requires_grad_(False), dims, settings
        self.linears = [entry for entry in ffn_linears(model) if entry[0] in set(ffns)]
        total = settings.batches * settings.batch_size
        generator = generator_for(settings.seed, "noise levels")
        # Stratified: each of all the samples has its own slice of 0..1.
        self.levels = (torch.randperm(total, generator=generator) + torch.rand(total, generator=generator)) / total

    def record(self, index: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """Return the tensors of batch number `index`, on the CPU, and its loss."""
        generator = generator_for(self.settings.seed, f"batch {index}")
        recorder = Recorder(-(-self.settings.tokens // self.settings.batches), generator)
        t_B = self.levels[index * self.settings.batch_size :][: self.settings.batch_size]
        batch = with_images(self.model, batch, generator)
        taylor = TaylorImportance.of(self.model, self.linears) if self.settings.taylor else None
        with torch.set_grad_enabled(taylor is not None), self._hooked(recorder, batch):
            loss = flow_matching_loss(self.model, batch, t_B, generator)
            if taylor is not None:
                loss.backward()
                recorder.importance(taylor.close())
        with torch.no_grad():
            recorder.silu_vecs(batch.pooled_BV, self.dims.guidance_embed, self._vec)
        return recorder.tensors(), float(loss.detach())

    @contextmanager
    def _hooked(self, recorder: Recorder, batch: Batch) -> Iterator[None]:
        """Feed `recorder` from every FFN and block during the `with`."""
        handles = [self._hook_ffn(recorder, name, up, batch) for name, up, _, _ in self.linears]
        handles += [self._hook_block(recorder, block.name, module) for block, module in blocks_of(self.model).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook_ffn(
        self, recorder: Recorder, name: str, up: torch.nn.Linear, batch: Batch
    ) -> torch.utils.hooks.RemovableHandle:
        """Record inputs of an FFN, without text padding."""
        words_BL, stream = batch.words_BL, FFN.parse(name).stream
        valid: Tensor | None = None  # of the FFN's tokens, text first; None: all
        if stream == "txt":
            valid = words_BL
        elif stream != "img":
            valid = torch.cat([words_BL, torch.ones(batch.images().shape[:2], dtype=torch.bool)], 1)

        def hook(_: torch.nn.Module, arguments: tuple[Tensor]) -> None:
            if recorder.has(f"inputs.{name}"):
                return  # computed again for the backward pass, under gradient checkpointing
            x_TH = arguments[0].detach().flatten(0, 1)
            recorder.ffn_inputs(name, x_TH if valid is None else x_TH[valid.flatten().to(x_TH.device)])

        return up.register_forward_pre_hook(hook)

    def _hook_block(self, recorder: Recorder, name: str, block: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Record a block's inputs and how it changes them; with the first block also vec."""
        parameters = list(inspect.signature(block.forward).parameters)

        @torch.no_grad()
        def hook(_: torch.nn.Module, arguments: tuple, keywords: dict, outputs: tuple[Tensor, Tensor]) -> None:
            if recorder.has(f"mean.{name}"):
                return  # computed again for the backward pass, under gradient checkpointing
            inputs = dict(zip(parameters, arguments, strict=False)) | keywords
            # diffusers' blocks return text before image.
            streams = text, _ = inputs["encoder_hidden_states"], inputs["hidden_states"]
            recorder.block_inputs(name, streams, None if recorder.has("vec") else inputs["temb"])
            recorder.block_change(name, streams, outputs, slice(text.shape[1], None))
            if not self.settings.streams:
                return
            if name.startswith(BFL_BLOCKS["double"]):
                for stream, before, after in zip(("txt", "img"), streams, outputs, strict=True):
                    recorder.stream_change(name, stream, before, after)
            else:
                recorder.stream_change(name, "joint", torch.cat(streams, 1), torch.cat(outputs, 1))

        return block.register_forward_hook(hook, with_kwargs=True)

    def _vec(self, pooled_nV: Tensor, t_n: Tensor, guidance_n: Tensor | None) -> Tensor:
        """Conditioning vectors [n, H]."""
        conditions = [1000 * condition_n for condition_n in (t_n, guidance_n) if condition_n is not None]
        to_model = {"device": self.model.device, "dtype": self.model.dtype}
        vec_nH: Tensor = self.model.time_text_embed(*(c.to(**to_model) for c in conditions), pooled_nV.to(**to_model))
        return vec_nH


def with_images(model: FluxTransformer2DModel, batch: Batch, generator: torch.Generator) -> Batch:
    """Return the batch; if it has prompts only, with images that the dense `model` samples from them."""
    if batch.tokens_BTC is not None:
        return batch
    from ..flow.noise import channels_of, grid, time_shift, trajectory
    from ..run_config import TimestepsSection

    section, count, length = TimestepsSection(), len(batch.pooled_BV), len(batch.image_ids_T3)
    noise_BTC = torch.randn(count, length, channels_of(model), generator=generator)
    levels = grid(section.grid_steps, time_shift(length, section))
    return replace(batch, tokens_BTC=trajectory(model, batch, noise_BTC, levels).cpu())


def flow_matching_loss(model: FluxTransformer2DModel, batch: Batch, t_B: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the model's velocity against noise - image, at noise levels t in 0..1."""
    images_BTC = batch.images()
    noise_BTC = torch.randn(images_BTC.shape, generator=generator)
    noisy_BTC = noised(images_BTC, noise_BTC, t_B)
    velocity_BTC = velocity(model, batch, noisy_BTC, t_B, batch.guidance_B, model.config.guidance_embeds)
    return (velocity_BTC.float() - (noise_BTC - images_BTC).to(velocity_BTC.device)).square().mean()

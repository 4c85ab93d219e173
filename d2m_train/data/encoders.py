"""Text encoders and autoencoder of a FLUX, from a diffusers pipeline: loaded on first use, freed by `release`.

Shapes: B batch, L text tokens, D context width, V pooled width, P pixels; latents are [B, channels, P/8, P/8].
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from d2m_model.config import PATCH_LATENTS, PATCH_PIXELS

from .. import UserError
from .batch import Texts
from .comfyui_encoders import find_text_encoders, load_autoencoder, load_text_encoders

_PIPELINE = (
    "a diffusers FLUX pipeline (a folder, or its name on the hub) with text_encoder, text_encoder_2, tokenizer, "
    "tokenizer_2 and model_index.json; or a folder with clip_l and t5xxl files, as ComfyUI has them"
)
_SAMPLE, _SAMPLES = 1 << 16, 64  # bytes in a piece, and number of pieces, by which large files are compared


class TextEncoders(Protocol):
    """Text encoders. `identity` changes with weights and sequence length; results fit in `dtype` without loss."""

    identity: str
    dtype: torch.dtype

    def encode(self, prompts: Sequence[str]) -> Texts: ...

    def release(self) -> None:
        """Free the memory; `encode` loads again."""
        ...


class ImageAutoencoder(Protocol):
    """An autoencoder. Images are [B, 3, P, P] in 0..1, latents in FLUX's model space; both float32 on the CPU."""

    identity: str

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def release(self) -> None: ...


def no_text_encoders() -> UserError:
    return UserError(f"No text encoders are known to encode prompts with: set data.text_encoders to {_PIPELINE}.")


class FluxTextEncoders:
    """CLIP's pooled vector and T5's sequence, as FluxPipeline makes them; T5 reads at most `tokens` tokens."""

    def __init__(self, name: str, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Raises UserError if there is no such pipeline."""
        self.name, self.tokens, self.dtype, self.device = name, tokens, dtype, device
        self.files = find_text_encoders(name)
        parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        if self.files is None:
            self.folder = _pipeline_folder(name, parts, "data.text_encoders", _PIPELINE)
        else:
            self.folder, parts = Path(name), tuple(file.name for file in self.files)
        self.identity = f"{folder_fingerprint(self.folder, parts)}, {tokens} tokens, {dtype}"
        self._pipeline: Any = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Texts:
        """Encode one by one, so that a result does not depend, to the last bit, on the rest of the batch."""
        pipeline = self._loaded()
        rows = []
        with _quiet():
            for prompt in prompts:
                context, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=self.tokens)
                words = pipeline.tokenizer_2(
                    prompt, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
                ).attention_mask
                rows.append((context.float().cpu(), pooled.float().cpu(), words.bool()))
        return Texts(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def release(self) -> None:
        """Free the memory; `encode` loads again."""
        if self._pipeline is not None:
            self._pipeline = None
            _give_back(self.device)

    def _loaded(self) -> Any:
        if self._pipeline is None:
            from diffusers import FluxPipeline

            with _loading(self.folder, _PIPELINE):
                if self.files is None:
                    pipeline = FluxPipeline.from_pretrained(
                        self.folder, transformer=None, vae=None, scheduler=None, torch_dtype=self.dtype
                    )
                else:
                    encoders = load_text_encoders(*self.files, self.dtype)
                    pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **encoders)
                self._pipeline = pipeline.to(self.device)
        return self._pipeline


class FluxAutoencoder:
    """FLUX's AutoencoderKL: the mean of its latents, shifted and scaled by its configuration."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """`name`: a pipeline, a folder with only the autoencoder, or its file. Raises UserError if there is none."""
        self.name, self.dtype, self.device = name, dtype, device
        alone = (Path(name) / "config.json").is_file() or Path(name).is_file()
        expected = (
            "a diffusers FLUX pipeline (a folder, or its name on the hub) with vae, the folder vae, or ae.safetensors"
        )
        self.folder = Path(name) if alone else _pipeline_folder(name, ("vae",), "data.vae", expected) / "vae"
        self.identity = f"{folder_fingerprint(self.folder, ('.',))}, {dtype}"
        self._vae: Any = None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode one by one, as texts are."""
        vae = self._loaded()
        to_model = {"device": self.device, "dtype": self.dtype}
        latents = torch.cat(
            [vae.encode(image[None].to(**to_model) * 2 - 1).latent_dist.mode().cpu() for image in images]
        )
        return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._loaded()
        latents = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        to_model = {"device": self.device, "dtype": self.dtype}
        images = torch.cat([vae.decode(latent[None].to(**to_model), return_dict=False)[0].cpu() for latent in latents])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def release(self) -> None:
        """Free the memory; the next call loads again."""
        if self._vae is not None:
            self._vae = None
            _give_back(self.device)

    def _loaded(self) -> Any:
        if self._vae is None:
            from diffusers import AutoencoderKL

            with _loading(self.folder, "an AutoencoderKL in diffusers' layout"):
                if self.folder.is_file():
                    vae = load_autoencoder(self.folder, self.dtype)
                else:
                    vae = AutoencoderKL.from_pretrained(self.folder, torch_dtype=self.dtype)
            shrinks = 2 ** (len(vae.config.block_out_channels) - 1)
            if shrinks * PATCH_LATENTS != PATCH_PIXELS:
                raise UserError(
                    f"{self.folder}: this autoencoder makes images {shrinks} times smaller; FLUX's makes 8."
                )
            self._vae = vae.to(self.device).requires_grad_(False)
        return self._vae


def folder_fingerprint(folder: Path, parts: Sequence[str]) -> str:
    """Hash names, sizes and some pieces of every file, to recognise weights without reading all of them.

    The hash does not depend on the folder's path or on times.
    """
    digest = hashlib.sha256()
    paths = [folder / part for part in parts]
    below = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    files = sorted(file for file in below if file.suffix in _PARTS)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size};".encode())
        with open(file, "rb") as stored:
            if size <= _SAMPLE * _SAMPLES:
                digest.update(stored.read())
            else:
                for piece in range(_SAMPLES):
                    stored.seek(piece * (size - _SAMPLE) // (_SAMPLES - 1))
                    digest.update(stored.read(_SAMPLE))
    return digest.hexdigest()[:32]


_PARTS = {".json", ".safetensors", ".sft", ".bin", ".model", ".txt"}


def _pipeline_folder(name: str, parts: Sequence[str], field: str, expected: str) -> Path:
    """Return the pipeline's folder, local or in the hub's cache. Raises UserError if parts are missing."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise UserError(f"{field}: {name}: there is no such folder. Expected {expected}.")
        from huggingface_hub import snapshot_download

        patterns = ["model_index.json", *(f"{part}/*{kind}" for part in parts for kind in sorted(_PARTS - {".bin"}))]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # of many types: the hub's and the network's
            raise UserError(
                f"{field}: {name}: there is no such folder, and the hub did not give it ({_first_line(error)}). "
                f"Expected {expected}."
            ) from None
    needed = [*parts, *(["model_index.json"] if len(parts) > 1 else [])]
    if missing := [part for part in needed if not (folder / part).exists()]:
        raise UserError(f"{field}: {folder} has no {', '.join(missing)}. Expected {expected}.")
    return folder


@contextmanager
def _loading(folder: Path, expected: str) -> Iterator[None]:
    """Turn the libraries' errors into UserError, and silence the warning for `torch_dtype`, which old versions need."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    except UserError:
        raise
    except Exception as error:  # of any type
        raise UserError(f"{folder}: cannot be loaded as {expected}: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence a warning for every caption that is too long for CLIP: most are, and T5 reads all of it."""
    loggers = [logging.getLogger(name) for name in _WARN_OF_LENGTH]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_WARN_OF_LENGTH = ("diffusers.pipelines.flux.pipeline_flux", "transformers.tokenization_utils_base")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _give_back(device: torch.device | str) -> None:
    """Return cached memory to the device. The tensors are freed already: these models have no reference cycles."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()

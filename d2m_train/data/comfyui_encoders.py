"""Text encoders and autoencoder of FLUX.1 from single files, as they lie in a ComfyUI: clip_l, t5xxl and ae.

The files have weights alone. Their architectures are FLUX.1's, with sizes from the weights; the tokenizers are those of a
ComfyUI or a pipeline, or of the hub's cache. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m_model.tensor_file import CheckpointError, TensorFile

from .. import UserError

_CLIP_HEAD = 64  # width of an attention head
_IN_COMFYUI = {"tokenizer": "comfy/sd1_tokenizer", "tokenizer_2": "comfy/text_encoders/t5_tokenizer"}
_PIPELINES = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")  # in the hub's cache, perhaps
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")  # one of them makes a folder a tokenizer's
_SUFFIXES = {".safetensors", ".sft"}


def find_text_encoders(name: str) -> tuple[Path, Path] | None:
    """Return the files (CLIP-L, T5) of a folder that has them by ComfyUI's names; None for other folders.

    Raises UserError where there are several of a kind.
    """
    folder = Path(name)
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return None
    found = {kind: sorted(file for file in folder.iterdir() if _is_kind(file, kind)) for kind in ("clip_l", "t5xxl")}
    if not all(found.values()):
        return None
    for kind, files in found.items():
        if len(files) > 1:
            raise UserError(
                f"data.text_encoders: {folder} has {', '.join(file.name for file in files)}; expected one {kind} file. "
                "Make a folder with links to the two that are wanted."
            )
    return found["clip_l"][0], found["t5xxl"][0]


def _is_kind(file: Path, kind: str) -> bool:
    return file.suffix in _SUFFIXES and file.name.lower().startswith(kind)


def load_text_encoders(clip: Path, t5: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return FluxPipeline's text_encoder, text_encoder_2, tokenizer and tokenizer_2. Raises UserError."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    first, second = _weights(clip, "text_model."), _weights(t5)
    config = _clip_config(first, clip)
    longest = {"model_max_length": config.max_position_embeddings}  # ComfyUI's tokenizer has no maximum of its own
    return {
        "text_encoder": _filled(CLIPTextModel, config, first, dtype, clip),
        "text_encoder_2": _filled(T5EncoderModel, _t5_config(second, t5), second, dtype, t5),
        "tokenizer": _tokenizer(CLIPTokenizer, "tokenizer", clip, **longest),
        "tokenizer_2": _tokenizer(T5TokenizerFast, "tokenizer_2", t5),
    }


def load_autoencoder(file: Path, dtype: torch.dtype) -> Any:
    """Return FLUX.1's AutoencoderKL with the weights of ae.safetensors, in BFL's or diffusers' names. Raises UserError."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    weights = _weights(file, "vae.")
    bfl = "encoder.down.0.block.0.conv1.weight" in weights
    down = "encoder.down.{}.block.{}.conv2.weight" if bfl else "encoder.down_blocks.{}.resnets.{}.conv2.weight"
    channels = [weights[down.format(level, 0)].shape[0] for level in range(4) if down.format(level, 0) in weights]
    latents = weights.get("decoder.conv_in.weight")
    if len(channels) != 4 or latents is None:
        raise UserError(f"data.vae: {file} is not FLUX's autoencoder (ae.safetensors).")
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(channels),
        layers_per_block=sum(down.format(0, place) in weights for place in range(8)),
        latent_channels=latents.shape[1],
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    if bfl:
        weights = convert_ldm_vae_checkpoint(weights, model.config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"data.vae: {file} is not FLUX's autoencoder: {str(error).splitlines()[-1].strip()}") from None
    return model.to(dtype).eval()


def _weights(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read a file's weights, those below `prefix` if it has such names. Scaled float8 is dequantised."""
    try:
        with TensorFile(file) as stored:
            inside = any(name.startswith(prefix) for name in stored.shapes)
            names = {name.removeprefix(prefix): name for name in stored.shapes if not inside or name.startswith(prefix)}
            read = {short: stored.tensor(name).clone() for short, name in names.items()}
    except CheckpointError as error:
        raise UserError(f"{error}") from None
    return dict(_dequantised(read, file))


def _dequantised(read: Mapping[str, Tensor], file: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read.items():
        layer, _, kind = name.rpartition(".")
        if kind in ("scale_weight", "weight_scale", "scale_input", "input_scale") or name == "scaled_fp8":
            continue
        if not tensor.is_floating_point():
            if kind in ("position_ids", "comfy_quant"):
                continue
            raise UserError(f"{file}: {name} is {tensor.dtype}; expected weights in float32, 16 bits or float8.")
        scale = read.get(f"{layer}.scale_weight", read.get(f"{layer}.weight_scale")) if kind == "weight" else None
        yield name, tensor if scale is None else tensor.float() * scale.float()


def _clip_config(weights: Mapping[str, Tensor], file: Path) -> Any:
    from transformers import CLIPTextConfig

    try:
        words = weights["embeddings.token_embedding.weight"]
        places = weights["embeddings.position_embedding.weight"]
        middle = weights["encoder.layers.0.mlp.fc1.weight"]
    except KeyError as error:
        raise UserError(f"{file} is not CLIP-L's text encoder: it has no {error.args[0]}.") from None
    return CLIPTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        projection_dim=words.shape[1],
        intermediate_size=middle.shape[0],
        num_hidden_layers=_count(weights, "encoder.layers.{}.mlp.fc1.weight"),
        num_attention_heads=max(1, words.shape[1] // _CLIP_HEAD),
        max_position_embeddings=places.shape[0],
        bos_token_id=words.shape[0] - 2,
        eos_token_id=words.shape[0] - 1,
        pad_token_id=words.shape[0] - 1,
    )


def _t5_config(weights: Mapping[str, Tensor], file: Path) -> Any:
    from transformers import T5Config

    first = "encoder.block.0.layer.0.SelfAttention."
    try:
        buckets, heads = weights[f"{first}relative_attention_bias.weight"].shape
        wide, hidden = weights[f"{first}q.weight"].shape
        words = weights["shared.weight" if "shared.weight" in weights else "encoder.embed_tokens.weight"]
    except KeyError as error:
        raise UserError(f"{file} is not T5's encoder: it has no {error.args[0]}.") from None
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    return T5Config(
        vocab_size=words.shape[0],
        d_model=hidden,
        d_kv=wide // heads,
        d_ff=weights[gated if gated in weights else gated.replace("wi_0", "wi")].shape[0],
        num_layers=_count(weights, "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated in weights else "relu",
    )


def _count(weights: Mapping[str, Tensor], name: str) -> int:
    """Return how many layers there are. `name`: a tensor's name in a layer, with {} for the layer's number."""
    number = 0
    while name.format(number) in weights:
        number += 1
    return number


def _filled(kind: Any, config: Any, weights: dict[str, Tensor], dtype: torch.dtype, file: Path) -> Any:
    """Return a model of transformers with these weights, in eval()."""
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if "shared.weight" not in cast and "encoder.embed_tokens.weight" in cast:
        cast["shared.weight"] = cast["encoder.embed_tokens.weight"]
    with torch.device("meta"):
        names = kind(config).state_dict()
    if any(name.startswith("text_model.") for name in names):  # in transformers 4
        cast = {f"text_model.{name}": tensor for name, tensor in cast.items()}
    model, loading = kind.from_pretrained(
        None, config=config, state_dict=cast, torch_dtype=dtype, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{file}: has no {missing[0]}, which a {kind.__name__} has; expected ComfyUI's file.")
    return model.eval()


def _tokenizer(kind: Any, name: str, weights: Path, **options: Any) -> Any:
    """Return a tokenizer from beside the weights, from the ComfyUI that they lie in, or from the hub's cache."""
    for place in _tokenizer_places(name, weights):
        # Without a vocabulary transformers makes an empty tokenizer, without a word.
        if any((place / file).is_file() for file in _VOCABULARIES):
            return kind.from_pretrained(place, **options)
    raise UserError(
        f"data.text_encoders: {weights.parent} has the weights but no {name}. Put the folders tokenizer and tokenizer_2 of a "
        "FLUX pipeline beside them, or set COMFYUI_PATH to a ComfyUI, which has both."
    )


def _tokenizer_places(name: str, weights: Path) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache

    yield weights.parent / name
    for path in dict.fromkeys((weights.absolute(), weights.resolve())):
        yield from (parent / _IN_COMFYUI[name] for parent in path.parents)
    if comfyui := os.environ.get("COMFYUI_PATH"):
        yield Path(comfyui) / _IN_COMFYUI[name]
    for pipeline in _PIPELINES:
        for file in _VOCABULARIES:
            if isinstance(cached := try_to_load_from_cache(pipeline, f"{name}/{file}"), str):
                yield Path(cached).parent

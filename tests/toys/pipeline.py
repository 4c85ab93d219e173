"""A FLUX pipeline's text encoders and autoencoder, random and tiny, as diffusers lays them out in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CONTEXT, POOLED = 32, 24  # widths
SHIFT, SCALE = 0.25, 0.5  # of the latents
WORDS = ("a", "photo", "of", "cat", "dog", "red", "blue", "tree", "on", "hill")


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae and model_index.json; no transformer."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(seed)
    letters = sorted(set("".join(WORDS)))
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(vocabulary)}))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")
    clip = CLIPTokenizer(
        str(folder / "words" / "vocab.json"), str(folder / "words" / "merges.txt"), model_max_length=16
    )
    clip.save_pretrained(folder / "tokenizer")

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS] + [(letter, -5.0) for letter in letters] + [("▁", -4.0)]
    unigram = Tokenizer(Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = Metaspace()
    t5 = T5TokenizerFast(tokenizer_object=unigram, extra_ids=0, model_max_length=64)
    t5.save_pretrained(folder / "tokenizer_2")

    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=POOLED,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=POOLED,
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
            pad_token_id=len(vocabulary) - 1,
        )
    ).save_pretrained(folder / "text_encoder")
    T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=CONTEXT, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "text_encoder_2")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        sample_size=64,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    classes = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **classes}))
    return folder

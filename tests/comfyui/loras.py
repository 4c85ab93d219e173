"""LoRAs of every kind that ComfyUI reads, in every naming that its key map has for FLUX.

A kind makes the tensors that change one weight, by the suffixes of their keys. Each changes it by several per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RANK = 4
BLOCK = 16  # rows that OFT rotates together
PREFIX = "diffusion_model."

Offset = tuple[int, int, int]  # axis, start, length


@dataclass(frozen=True)
class Naming:
    """How a trainer names the weights of a FLUX: the beginning of its keys, in ComfyUI's key map."""

    prefixes: tuple[str, ...]

    def keys(self, key_map: dict[str, Any], wanted: Callable[[str, Offset | None], bool]) -> dict[str, list[str]]:
        """Its keys for the tensors that are wanted: all spellings of each, by the tensor's name."""
        found: dict[str, list[str]] = {}
        for key, target in key_map.items():
            name, offset = (target, None) if isinstance(target, str) else target[:2]
            if key.startswith(self.prefixes) and name.endswith(".weight") and wanted(name, offset):
                found.setdefault(str(name), []).append(key)
        return found


NAMINGS = {
    "BFL": Naming((PREFIX,)),
    "kohya": Naming(("lora_unet_",)),
    "diffusers": Naming(("transformer.",)),
    "diffusers without prefix": Naming(("transformer_blocks.", "single_transformer_blocks.")),
    "OneTrainer": Naming(("lora_transformer_",)),
    "LyCORIS": Naming(("lycoris_",)),
}


class Random:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * gain


Kind = Callable[[Random, int, int], dict[str, Tensor]]


def lora(randn: Random, rows: int, columns: int, up: str = "lora_up", down: str = "lora_down") -> dict[str, Tensor]:
    return {
        f".{up}.weight": randn(rows, RANK, gain=0.3),
        f".{down}.weight": randn(RANK, columns, gain=columns**-0.5),
        ".alpha": torch.tensor(RANK / 2),
    }


def peft(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    found = lora(randn, rows, columns, "lora_B", "lora_A")
    del found[".alpha"]
    return found


def lora_with_mid(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    found = {
        key: tensor if key == ".alpha" else tensor[..., None, None]
        for key, tensor in lora(randn, rows, columns).items()
    }
    return {**found, ".lora_mid.weight": randn(RANK, RANK, 1, 1)}


def lora_with_shape(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {**lora(randn, rows, columns), ".reshape_weight": torch.tensor([rows, columns])}


def dora_of_rows(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {**peft(randn, rows, columns), ".dora_scale": 1 + randn(rows, 1, gain=0.1)}


def dora_of_columns(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {**lora(randn, rows, columns), ".dora_scale": math.sqrt(rows / columns) * (1 + randn(1, columns, gain=0.1))}


def loha(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".hada_w1_a": randn(rows, RANK, gain=0.5),
        ".hada_w1_b": randn(RANK, columns, gain=0.3),
        ".hada_w2_a": randn(rows, RANK, gain=0.5),
        ".hada_w2_b": randn(RANK, columns, gain=columns**-0.5),
        ".alpha": torch.tensor(2.0),
    }


def loha_around_a_core(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    found = {
        key: tensor.T.contiguous() if key.endswith("_a") else tensor
        for key, tensor in loha(randn, rows, columns).items()
    }
    return {**found, ".hada_t1": randn(RANK, RANK, 1, 1), ".hada_t2": randn(RANK, RANK, 1, 1)}


def lokr(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {".lokr_w1": randn(4, 8, gain=0.3), ".lokr_w2": randn(rows // 4, columns // 8, gain=columns**-0.5)}


def lokr_factorised(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".lokr_w1_a": randn(8, 2, gain=0.5),
        ".lokr_w1_b": randn(2, 4, gain=0.5),
        ".lokr_w2_a": randn(rows // 8, RANK, gain=0.5),
        ".lokr_w2_b": randn(RANK, columns // 4, gain=columns**-0.5),
        ".alpha": torch.tensor(3.0),
    }


def lokr_around_a_core(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".lokr_w1": randn(4, 8, gain=0.3),
        ".lokr_w2_a": randn(RANK, rows // 4),
        ".lokr_w2_b": randn(RANK, columns // 8, gain=columns**-0.5),
        ".lokr_t2": randn(RANK, RANK, 1, 1, gain=0.5),
        ".alpha": torch.tensor(3.0),
    }


def lokr_as_dora(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {**lokr(randn, rows, columns), ".dora_scale": 1 + randn(rows, 1, gain=0.1)}


def glora(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        ".a1.weight": randn(columns, RANK, gain=columns**-0.5),
        ".a2.weight": randn(RANK, columns, gain=columns**-0.5),
        ".b1.weight": randn(rows, RANK, gain=0.3),
        ".b2.weight": randn(RANK, columns, gain=columns**-0.5),
        ".alpha": torch.tensor(3.0),
    }


def older_glora(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    found = glora(randn, rows, columns)
    names = (".a1.weight", ".a2.weight"), (".b1.weight", ".b2.weight")
    for one, two in names:
        found[one], found[two] = found[two], found[one]
    return found


def oft(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {".oft_blocks": randn(rows // BLOCK, BLOCK, BLOCK, gain=0.1)}


def oft_held_back(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {**oft(randn, rows, columns), ".alpha": torch.tensor(2.0), ".rescale": torch.ones(rows, 1)}


def boft_without_alpha(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {".oft_blocks": randn(2, rows // 8, 8, 8, gain=0.1), ".rescale": 1 + randn(rows, 1, gain=0.1)}


def boft(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {**boft_without_alpha(randn, rows, columns), ".alpha": torch.tensor(3.0)}


def diff(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {".diff": randn(rows, columns, gain=0.2 * columns**-0.5)}


def diff_with_bias(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {**diff(randn, rows, columns), ".diff_b": randn(rows)}


def bias(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {".diff_b": randn(rows)}


def norm(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {".w_norm": randn(rows, columns, gain=0.2 * columns**-0.5), ".b_norm": randn(rows)}


def replacement(randn: Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {".set_weight": randn(rows, columns, gain=columns**-0.5)}


KINDS: dict[str, Kind] = {
    "LoRA": lora,
    "LoRA of PEFT": peft,
    "LoRA with mid": lora_with_mid,
    "LoRA with reshape_weight": lora_with_shape,
    "DoRA, rows": dora_of_rows,
    "DoRA, columns": dora_of_columns,
    "LoHa": loha,
    "LoHa, Tucker": loha_around_a_core,
    "LoKr": lokr,
    "LoKr, factorised": lokr_factorised,
    "LoKr with DoRA": lokr_as_dora,
    "GLoRA": glora,
    "GLoRA, older": older_glora,
    "OFT": oft,
    "OFT, constrained": oft_held_back,
    "BOFT": boft,
    "diff": diff,
    "diff and bias": diff_with_bias,
    "bias": bias,
    "norm": norm,
    "set": replacement,
}
# Kinds at which ComfyUI 0.18 and 0.30 fail, with an error in the log and the weight as it was.
FAILING: dict[str, Kind] = {"LoKr, Tucker": lokr_around_a_core, "BOFT without alpha": boft_without_alpha}
# What ComfyUI applies to a whole tensor only: of a slice (diffusers' proj_mlp) it drops the bias and the new shape.
WHOLE = ("LoRA with reshape_weight", "diff and bias", "bias", "norm")
# They rotate rows, and so do not mind another order of the columns.
ROTATIONS = ("OFT", "OFT, constrained", "BOFT")


def of_kind(
    kind: str, keys: Iterable[str], key_map: dict[str, Any], shapes: dict[str, Any], seed: int = 0
) -> dict[str, Tensor]:
    """A LoRA that changes what `keys` of the key map stand for. `shapes` are the teacher's, by tensor name."""
    randn, found = Random(seed), {}
    for key in keys:
        target = key_map[key]
        name, offset = (target, None) if isinstance(target, str) else target[:2]
        rows, columns = shapes[str(name)]
        rows = rows if offset is None else offset[2]
        found |= {f"{key}{suffix}": tensor for suffix, tensor in (KINDS | FAILING)[kind](randn, rows, columns).items()}
    return found

"""Files that are no FLUX-MoE, or a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2m_model.config import BlockGroup
from tests.toys import files

# Kind of file: words of the error.
WRONG = {
    "not FLUX": "not a FLUX",
    "dense": "d2m_train convert",
    "truncated": "truncated or damaged",
    "no safetensors": "safetensors",
    "missing router": "single_blocks.1.router.weight is missing",
    "missing weight": "double_blocks.1.img_mlp.2.weight is missing",
    "wrong shape": "single_blocks.1.linear1.weight has shape [895, 128]; expected [896, 128]",
    "newer schema": "Update ComfyUI-Dense2MoE",
    "missing block router": "block_groups.0.router_y.weight is missing",
}


def write_wrong(kind: str, dense: dict[str, Tensor], split: dict[str, Tensor], file: Path) -> None:
    """Write what `kind` names: `split`, the FLUX-MoE of `dense`, with one thing wrong."""
    tensors = dict(split)
    if kind == "not FLUX":
        save_file({"encoder.conv_in.weight": torch.zeros(4, 4), "decoder.conv_in.weight": torch.zeros(4, 4)}, file)
    elif kind == "dense":
        files.save(dense, file)
    elif kind == "truncated":
        files.save(tensors, file)
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "no safetensors":
        file.write_bytes(b"<html>404</html>" * 100)
    else:
        if kind == "missing router":
            del tensors["single_blocks.1.router.weight"]
        elif kind == "missing weight":
            del tensors["double_blocks.1.img_mlp.2.weight"]
        elif kind == "wrong shape":
            tensors["single_blocks.1.linear1.weight"] = tensors["single_blocks.1.linear1.weight"][1:]
        elif kind == "missing block router":
            tensors = files.split(
                dense, groups=(BlockGroup(kind="single", first=0, blocks=3, active=1, selection="topk"),)
            )
            del tensors["block_groups.0.router_y.weight"]
        elif kind == "newer schema":
            config = json.loads(bytes(tensors["d2m_config"].numpy()))
            tensors["d2m_config"] = files.config_tensor(json.dumps({**config, "schema_version": 99, "new_field": 1}))
        files.save(tensors, file)

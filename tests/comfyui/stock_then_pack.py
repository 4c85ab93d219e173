"""Sample a FLUX-MoE in a process of its own: first with the stock loader and without this pack, then with it.

`python -m tests.comfyui.stock_then_pack FILE OUT --top-k K`
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch

from demo.in_process import Comfy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--top-k", type=int, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        comfy = Comfy(Path(base))
        stock = comfy.load(options.file)
        found = {"stock class": type(stock.model).__name__, "stock": comfy.sample(stock)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            comfy.load_pack()
        found["moe"] = comfy.sample(comfy.top_k(comfy.load(options.file), options.top_k))
        torch.save(found, options.out)


if __name__ == "__main__":
    main()

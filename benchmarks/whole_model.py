"""Speed of a whole FLUX-MoE in ComfyUI, compared with the dense FLUX from which it was made.

    python -m benchmarks.whole_model                     FLUX.1's width in bfloat16, few blocks, 512 x 512
    python -m benchmarks.whole_model --sides 256 1024 --batch 1 2
    python -m benchmarks.whole_model --device cuda --layers 19 38

Both run in ComfyUI's own code, in turns in one process. `FLOPs` is the speed-up that the FLOPs allow. `limit` weighs
FLOPs by the rates at which this machine computes them: the dense model's time less the time of the FFN products that are
left out, both measured in the same turns; attention and norms, which run at other rates than products, are not made
faster by experts. `of limit` is the measured speed-up as a share of that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2m_model import cost
from d2m_model.config import PATCH_PIXELS, FFNLayout, FluxDims, paper_layout
from demo.in_process import Comfy

from .full_size import flux_of, write_random
from .record import commit, machine, median_ratio, seconds_side_by_side, write_result
from .trace import converted

_TEXT_TOKENS = 512


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 4), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--sides", type=int, nargs="+", default=[512], metavar="PIXELS")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B")
    parser.add_argument("--top-k", type=int, nargs="+", default=[0, 2, 4, 8, 12], metavar="K")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    about = machine(args.device)
    print(f"FLUX-MoE in ComfyUI on {about['device']}, {about['threads']} threads; {commit()}\n")
    print("tokens  batch  top-k     dense s       MoE s  speed-up     FLOPs     limit  of limit")
    measurements = []
    with tempfile.TemporaryDirectory(prefix="benchmark-model-") as temporary:
        folder = Path(temporary)
        host = Comfy(folder / "comfyui", cpu=args.device.type == "cpu")
        host.load_pack()
        dims = flux_of(*args.layers)
        dense_file = folder / "flux.safetensors"
        write_random(dense_file, dims)
        models = host.load(dense_file), host.load(converted(dense_file, folder))
        for side in args.sides:
            for batch in args.batch:
                for measured in measure_size(host, models, dims, side, batch, args.top_k, args.device, args.rounds):
                    measurements.append(measured)
                    print(
                        f"{measured['tokens']:6,}  {batch:5}  {measured['top_k']:5}  {measured['dense_seconds']:10.3f}"
                        f"  {measured['moe_seconds']:10.3f}  {measured['speed_up']:8.3f}  {measured['flops']:8.3f}"
                        f"  {measured['limit']:8.3f}  {measured['of_limit']:8.1%}"
                    )
    if not args.no_write:
        print(f"\n{write_result('whole_model', args.device, measurements, args.out)}")
    return 0


@torch.inference_mode()
def measure_size(
    host: Comfy,
    models: tuple[Any, Any],
    dims: FluxDims,
    side: int,
    batch: int,
    top_ks: Sequence[int],
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure evaluations of the dense model and of the FLUX-MoE at each Top-K, and the FFN products they consist of."""
    dense, moe = models
    tokens = cost.Tokens(image=(side // PATCH_PIXELS) ** 2, text=_TEXT_TOKENS)
    layout = paper_layout(dims.hidden_size)
    variants: dict[str, Callable[[], object]] = {"dense": evaluate_at(dense, side, batch, device)}
    for top_k in top_ks:
        variants[f"moe {top_k}"] = evaluate_at(host.top_k(moe, top_k), side, batch, device)
    for part in (None, *top_ks):
        variants[f"ffn {part}"] = ffn_products(dims, layout, part, tokens, batch, device)
    seconds = seconds_side_by_side(variants, device, rounds)

    def flops(top_k: int | None) -> float:
        layouts = {} if top_k is None else dict.fromkeys(ffn_names(dims), layout)
        changes = cost.Conversion(ffns=layouts, groups=(), adaln_rank=None, experts_per_token=top_k or 0)
        return cost.flux(dims, changes, tokens).flops

    results = []
    for top_k in top_ks:
        left_out = [a - b for a, b in zip(seconds["ffn None"], seconds[f"ffn {top_k}"], strict=True)]
        least = [dense_s - less for dense_s, less in zip(seconds["dense"], left_out, strict=True)]
        speed_up = median_ratio(seconds["dense"], seconds[f"moe {top_k}"])
        limit = median_ratio(seconds["dense"], least)
        results.append(
            {
                "layers": [dims.double_blocks, dims.single_blocks],
                "side": side,
                "tokens": tokens.joint,
                "batch": batch,
                "top_k": top_k,
                "rounds": rounds,
                "dense_seconds": median(seconds["dense"]),
                "moe_seconds": median(seconds[f"moe {top_k}"]),
                "speed_up": speed_up,
                "flops": flops(None) / flops(top_k),
                "limit": limit,
                "of_limit": speed_up / limit,
            }
        )
    return results


def ffn_names(dims: FluxDims) -> list[str]:
    """Return the names of all FFNs."""
    return [ffn.name for block in dims.blocks for ffn in block.ffns]


def evaluate_at(model: Any, side: int, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that evaluates a MODEL once, at sigma 0.7, and has it on the device."""
    import comfy.model_management

    params, generator = model.model.diffusion_model.params, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    latents, context = normal(batch, 16, side // 8, side // 8), normal(batch, _TEXT_TOKENS, params.context_in_dim)
    pooled = normal(batch, params.vec_in_dim)

    def run() -> Tensor:
        comfy.model_management.load_models_gpu([model])
        result: Tensor = model.model.apply_model(
            latents, torch.full((batch,), 0.7, device=device), c_crossattn=context, y=pooled,
            guidance=torch.full((batch,), 3.5, device=device),
            transformer_options=model.model_options["transformer_options"],
        )  # fmt: skip
        return result

    return run


def ffn_products(
    dims: FluxDims, layout: FFNLayout, top_k: int | None, tokens: cost.Tokens, batch: int, device: torch.device
) -> Callable[[], None]:
    """Return a function that multiplies as all FFNs of the model do in one evaluation: with all neurons (top_k None), or
    with the shared expert's and as many others as top_k experts have."""
    hidden = dims.hidden_size
    neurons = 4 * hidden if top_k is None else layout.shared + top_k * layout.width
    up, down = (torch.randn(*shape, device=device).bfloat16() / 64 for shape in ((neurons, hidden), (hidden, neurons)))
    streams = [
        (tokens.image, dims.double_blocks),
        (tokens.text, dims.double_blocks),
        (tokens.joint, dims.single_blocks),
    ]
    inputs = [(torch.randn(batch * rows, hidden, device=device).bfloat16(), count) for rows, count in streams]

    def run() -> None:
        for x_TH, count in inputs:
            for _ in range(count):
                F.linear(F.gelu(F.linear(x_TH, up), approximate="tanh"), down)

    return run


if __name__ == "__main__":
    sys.exit(main())

"""Speed of the MoE FFN compared with the dense FFN from which it was made.

    python -m benchmarks.moe_ffn                      FLUX.1's FFN in bfloat16, 1,536 and 4,608 tokens
    python -m benchmarks.moe_ffn --hidden 1024        a smaller one
    python -m benchmarks.moe_ffn --device cuda

of ideal: the speed-up over the dense FFN as a share of the speed-up that the FLOPs allow. 100 % is a MoE layer that
spends no time on routing, gathering and scattering. 4,608 tokens are 1024 x 1024 pixels and 512 text tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from d2m_model import cost
from d2m_model.config import Gate, paper_layout
from d2m_model.moe import moe_ffn

from .record import commit, machine, median_ratio, seconds_side_by_side, write_result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3072, metavar="H", help="hidden size (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1536, 4608], metavar="T")
    parser.add_argument("--top-k", type=int, nargs="+", default=[2], metavar="K")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)

    about = machine(args.device)
    print(
        f"MoE FFN, hidden size {args.hidden}, {args.dtype}, on {about['device']}, {about['threads']} threads; {commit()}\n"
    )
    print("tokens  top-k    dense ms      MoE ms     ratio     FLOPs  of ideal")
    measurements = []
    for tokens in args.tokens:
        for top_k in args.top_k:
            measured = measure_ffn(args.hidden, tokens, top_k, getattr(torch, args.dtype), args.device, args.rounds)
            measurements.append(measured)
            print(
                f"{tokens:6,}  {top_k:5}  {1e3 * measured['dense_seconds']:10.2f}  {1e3 * measured['moe_seconds']:10.2f}"
                f"  {measured['ratio']:8.3f}  {measured['flops_ratio']:8.3f}  {measured['of_ideal']:8.1%}"
            )
    if not args.no_write:
        print(f"\n{write_result('moe_ffn', args.device, measurements)}")
    return 0


@torch.inference_mode()
def measure_ffn(
    hidden: int, tokens: int, top_k: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Measure with random weights, which balance the router, and gate mode `sum`, which costs as much as `normalised`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).to(device, dtype)

    layout, gate = paper_layout(hidden), Gate(mode="sum", scale=1.0)
    up, up_bias, down, down_bias = (
        normal(4 * hidden, hidden),
        normal(4 * hidden),
        normal(hidden, 4 * hidden),
        normal(hidden),
    )
    router, x = normal(layout.experts, hidden), normal(tokens, hidden)

    def dense() -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)

    def moe() -> torch.Tensor:
        return moe_ffn(x, up, up_bias, down, down_bias, router, None, None, layout=layout, gate=gate, top_k=top_k)

    seconds = seconds_side_by_side({"dense": dense, "moe": moe}, device, rounds)
    ratio = median_ratio(seconds["moe"], seconds["dense"])
    flops_ratio = cost.ffn(hidden, layout, top_k, tokens).flops / cost.ffn(hidden, None, 0, tokens).flops
    return {
        "hidden": hidden,
        "tokens": tokens,
        "top_k": top_k,
        "dtype": str(dtype).removeprefix("torch."),
        "dense_seconds": median(seconds["dense"]),
        "moe_seconds": median(seconds["moe"]),
        "ratio": ratio,
        "flops_ratio": flops_ratio,
        "of_ideal": flops_ratio / ratio,
    }


if __name__ == "__main__":
    sys.exit(main())

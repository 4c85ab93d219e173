"""Correctness and speed on a GPU, measured in one run of a few minutes.

    python -m benchmarks.gpu                    writes benchmarks/results/device-NAME.json
    python -m benchmarks.gpu --device cpu --hidden 128 --tokens 64 --no-write      rehearses on a CPU

Sections: the rates of products and copies; values of the experts and their gradients against float64, with each way to
compute them; the MoE FFN against the dense one, for each way; and a whole FLUX-MoE in ComfyUI against the dense FLUX
(`benchmarks.whole_model`). A section that fails is reported as such, and the others go on. Each section's result is
written at once, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from d2m_model import experts
from d2m_model.config import FFNLayout, Gate, paper_layout
from d2m_model.experts import EveryExpert, expert_down, expert_up, plan_dispatch
from d2m_model.kernels import choice
from d2m_model.routers import Routing
from d2m_model.routers.top_k import route_top_k

from .moe_ffn import measure_ffn
from .record import ROOT, commit, machine, seconds_side_by_side
from .whole_model import main as measure_whole_model

_GATE = Gate(mode="normalised", scale=2.0)
WAYS = ("kernels", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--hidden", type=int, default=3072, metavar="H", help="hidden size (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1536, 4608], metavar="T")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--whole-model", action=argparse.BooleanOptionalAction, default=True, help="measure it in ComfyUI"
    )
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here. `--device cpu` rehearses the run on the CPU.")

    about = machine(args.device)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = args.out or ROOT / "benchmarks" / "results" / f"device-{name}.json"
    result: dict[str, Any] = {"commit": commit(), "machine": about}
    sections: dict[str, Callable[[], Any]] = {
        "rates": lambda: measure_rates(args.device, args.rounds),
        "values": lambda: check_experts(args.hidden, args.tokens, args.device),
        "float8": lambda: check_float8(args.hidden, args.device),
        "ffn": lambda: measure_ways(args.hidden, args.tokens, args.device, args.rounds),
    }
    if args.whole_model:
        sections["whole model"] = lambda: whole_model(path, args.device)
    for section, run in sections.items():
        begin = time.monotonic()
        try:
            result[section] = run()
        except Exception:
            result[section] = {"failed": traceback.format_exc()}
        print(f"{section} ({time.monotonic() - begin:.0f} s)\n{json.dumps(result[section], indent=1)}", flush=True)
        if not args.no_write:
            path.write_text(json.dumps(result, indent=2) + "\n")
    return int(any("failed" in part for part in result.values() if isinstance(part, dict)))


def measure_rates(device: torch.device, rounds: int) -> dict[str, float]:
    """Measure what the device computes in bfloat16 products, and what it copies."""
    size, count = (8192, 1 << 30) if device.type == "cuda" else (512, 1 << 24)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = seconds_side_by_side({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds)
    return {
        "product_tflops": 2 * size**3 / median(seconds["product"]) / 1e12,
        "copy_gb_per_second": 2 * count / median(seconds["copy"]) / 1e9,
    }


@contextmanager
def computed(way: str) -> Iterator[None]:
    """Let the experts' products run in our kernels, where the device has them, or in torch's operators alone."""
    before = os.environ.get(choice.SWITCH)
    os.environ[choice.SWITCH] = "on" if way == "kernels" else "off"
    choice._chosen.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(choice.SWITCH) if before is None else os.environ.update({choice.SWITCH: before})
        choice._chosen.cache_clear()


def random_ffn(
    hidden: int, tokens: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> tuple[FFNLayout, Routing, list[Tensor]]:
    """Return a layout, a choice, and x, W1, b1 and W2 of the routed experts, W1 and W2 as views of wider weights."""
    layout, generator = paper_layout(hidden), torch.Generator().manual_seed(tokens + top_k)

    def normal(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    up = normal(layout.neurons, hidden, scale=hidden**-0.5)[layout.shared :].unflatten(0, (layout.experts, -1))
    bias = normal(layout.experts, layout.width, scale=0.1)
    down = normal(hidden, layout.neurons, scale=hidden**-0.5)[:, layout.shared :].unflatten(1, (layout.experts, -1))
    x = normal(tokens, hidden, scale=1.0)
    routing = route_top_k(x, normal(layout.experts, hidden, scale=hidden**-0.5), None, top_k=top_k, gate=_GATE)
    return layout, routing, [x, up, bias, down]


def run_experts(routing: Routing, tensors: Sequence[Tensor], *, exact: bool) -> Tensor:
    """Compute the routed experts: every expert at once (as float64 does it), or in sorted rows."""
    x, up, bias, down = tensors
    plan = EveryExpert(gates_TE=routing.gates_TE) if exact else plan_dispatch(routing, x)
    return expert_down(expert_up(x, plan, up, bias), plan, down)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check_experts(hidden: int, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the largest relative errors of results and gradients against float64, by way and dtype."""
    errors: dict[str, dict[str, float]] = {}
    for way in WAYS:
        for dtype in (torch.bfloat16, torch.float16):
            name = f"{way}, {str(dtype).removeprefix('torch.')}"
            worst = errors.setdefault(name, {"result": 0.0, "gradients": 0.0})
            for count in (1, 77, *tokens):
                for top_k in (1, 2, 11):
                    with computed(way):
                        _, routing, tensors = random_ffn(hidden, count, top_k, dtype, device)
                        results = []
                        for exact in (False, True):
                            kind = torch.float64 if exact else dtype
                            leaves = [it.detach().to(kind).requires_grad_() for it in tensors]
                            y = run_experts(routing, leaves, exact=exact)
                            y.backward(torch.ones_like(y))
                            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
                    found = [relative_error(a, b) for a, b in zip(*results, strict=True)]
                    worst["result"] = max(worst["result"], found[0])
                    worst["gradients"] = max(worst["gradients"], *found[1:])
    return errors


def check_float8(hidden: int, device: torch.device) -> dict[str, float] | str:
    """Return the relative error of products of weights in float8 against the same weights, converted."""
    _, routing, (x, up, bias, down) = random_ffn(hidden, 512, 2, torch.bfloat16, device)
    if not choice.has_kernels(x):
        return "no kernels here"
    errors = {}
    with torch.no_grad():
        plan, scale = plan_dispatch(routing, x), torch.tensor(0.5, device=device)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            narrow = up.to(dtype), down.to(dtype)
            wide = [weight.to(x.dtype) * scale.to(x.dtype) for weight in narrow]
            found = expert_down(expert_up(x, plan, narrow[0], bias, scale), plan, narrow[1], scale)
            expected = expert_down(expert_up(x, plan, wide[0], bias), plan, wide[1])
            errors[str(dtype).removeprefix("torch.")] = relative_error(found, expected.double())
    return errors


def measure_ways(hidden: int, tokens: Sequence[int], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Measure the MoE FFN against the dense one, with each way to compute the experts, and every expert at once."""
    measured = []
    for way in (*WAYS, "every expert"):
        always = experts.computes_every_expert
        if way == "every expert":
            experts.computes_every_expert = lambda *_: True
        try:
            with computed(way):
                for count in tokens:
                    for top_k in (2, 12):
                        found = measure_ffn(hidden, count, top_k, torch.bfloat16, device, rounds)
                        measured.append({"way": way, **found})
        finally:
            experts.computes_every_expert = always
    return measured


def whole_model(path: Path, device: torch.device) -> Any:
    """Measure a FLUX-MoE of a few blocks in ComfyUI, in a file beside the result that is read and removed."""
    few = ["--layers", "4", "8"] if device.type == "cuda" else ["--layers", "1", "1", "--rounds", "1"]
    sides = ["--sides", "512", "1024"] if device.type == "cuda" else ["--sides", "128"]
    out = path.with_suffix(".part.json")
    try:
        measure_whole_model([*few, *sides, "--device", str(device), "--top-k", "2", "12", "--out", str(out)])
        return json.loads(out.read_text())["measurements"]
    finally:
        out.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

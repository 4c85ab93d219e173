"""Cost of recording the routing: evaluations of a model with Trace Routing and without it.

    python -m benchmarks.trace                      FLUX.1's block size in bfloat16, few blocks; and the emoji FLUX
    python -m benchmarks.trace --layers 3 6 --side 1024

Both are run in turns by ComfyUI's sampler, in this process and on the CPU. `ratio` divides their processor times, and
`clock` their times on the clock (medians of the rounds). On a machine with other work, `clock` varies by more than the
difference that is measured, and `ratio` still by some percent. `recording` does not: it is the share of the traced runs'
processor time that recording took. The small model is for information: its evaluations are so short that the fixed cost
of recording matters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from demo.in_process import Comfy

from .full_size import flux_of, write_random
from .record import ROOT, commit, machine, median_ratio, seconds_side_by_side, write_result

_DEVICE = torch.device("cpu")
_EMOJI = ROOT / "demo" / "assets" / "diffusion_models" / "emoji-flux.safetensors"
_STEPS = 2
_TEXT_TOKENS = 512


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--side", type=int, default=256, metavar="PIXELS", help="side of FLUX.1's image (%(default)s)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    about = machine(_DEVICE)
    print(f"Tracing on {about['device']}, {about['threads']} threads; {commit()}\n")
    print("model                tokens   without s      with s     ratio     clock  recording  bytes per evaluation")
    measurements = []
    with tempfile.TemporaryDirectory(prefix="benchmark-trace-") as temporary:
        folder = Path(temporary)
        host = Comfy(folder / "comfyui")
        host.load_pack()
        dense = folder / "flux.safetensors"
        write_random(dense, flux_of(*args.layers))
        for name, teacher, side, text in (
            (f"FLUX.1, {args.layers[0]} + {args.layers[1]} blocks", dense, args.side, _TEXT_TOKENS),
            ("emoji FLUX", _EMOJI, 128, 12),
        ):
            model = host.top_k(host.load(converted(teacher, folder)), args.top_k)
            measured = {"model": name, "top_k": args.top_k, **measure_tracing(host, model, side, text, args.rounds)}
            measurements.append(measured)
            print(
                f"{name:20} {measured['tokens']:6,}  {measured['seconds_without']:10.3f}  {measured['seconds_with']:10.3f}"
                f"  {measured['ratio']:8.4f}  {measured['clock']:8.4f}  {measured['recording']:9.3%}  {measured['bytes']:20,}"
            )
    if not args.no_write:
        print(f"\n{write_result('trace', _DEVICE, measurements)}")
    return 0


def converted(teacher: Path, folder: Path) -> Path:
    """Convert a teacher with all FFNs routed, as in preset L."""
    out = folder / f"{teacher.stem}-moe.safetensors"
    command = ["convert", "--teacher", str(teacher), "--out", str(out), "--preset", "L", "--importance", "weight-norm"]
    subprocess.run([sys.executable, "-m", "d2m_train", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def measure_tracing(host: Comfy, model: Any, side: int, text: int, rounds: int) -> dict[str, Any]:
    """Measure sampling with and without Trace Routing."""
    traced, handle = host.execute("D2MTraceRouting", model=model).result
    recording, with_trace, without = Clock(), Clock(), Clock()
    tracer, recorder = host.module("d2m_model.trace").Run, host.module("d2m_model.trace").RoutingRecorder
    tracer.end, recorder.experts = recording.around(tracer.end), recording.around(recorder.experts)

    def run(which: Any) -> Callable[[], None]:
        def sampling() -> None:
            sample_steps(which, side, text)

        return sampling

    variants: dict[str, Callable[[], object]] = {
        "without": without.around(run(model)),
        "with": with_trace.around(run(traced)),
    }
    seconds = seconds_side_by_side(variants, _DEVICE, rounds)
    trace = host.module("nodes.expert_map.trace_store").STORE.show(handle.runs[-1:], "")[0][1]
    return {
        "side": side,
        "tokens": trace.image_tokens + trace.text_tokens,
        "layers": len(trace.layers),
        "evaluations": len(trace.steps),
        "rounds": rounds,
        "seconds_without": median(without.seconds[1:]) / _STEPS,
        "seconds_with": median(with_trace.seconds[1:]) / _STEPS,
        "ratio": median_ratio(with_trace.seconds[1:], without.seconds[1:]),
        "clock": median_ratio(seconds["with"], seconds["without"]),
        "recording": sum(recording.seconds) / sum(with_trace.seconds),
        "bytes": trace.size // len(trace.steps),
    }


class Clock:
    """Measures the processor seconds that this process spends in each call of a function."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a measurement of each call."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds.append(time.process_time() - start)

        return timed


def sample_steps(model: Any, side: int, text: int) -> None:
    """Run _STEPS evaluations of the model with ComfyUI's sampler."""
    import comfy.sample

    params, generator = model.model.diffusion_model.params, torch.Generator().manual_seed(0)
    context = torch.randn(1, text, params.context_in_dim, generator=generator)
    pooled = torch.randn(1, params.vec_in_dim, generator=generator)
    prompt = [[context, {"pooled_output": pooled, "guidance": 3.5}]]
    noise = torch.randn(1, 16, side // 8, side // 8, generator=generator)
    with torch.inference_mode():
        comfy.sample.sample(
            model,
            noise,
            _STEPS,
            1.0,
            "euler",
            "simple",
            prompt,
            prompt,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )


if __name__ == "__main__":
    sys.exit(main())

"""Tools of the benchmarks: timing side by side, a description of the machine, and the files of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def seconds_side_by_side(
    variants: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round, after a first round that does not count.

    The variants take turns, so that other work on the machine affects all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Return the median over the rounds of numerator / denominator."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine on which a benchmark runs."""
    described: dict[str, Any] = {
        "device": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if device.type == "cpu":
        described["instructions"] = torch.backends.cpu.get_cpu_capability()
    return described


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not know the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Return the measured commit, with a + if files were changed; `unknown` outside of git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def write_result(name: str, device: torch.device, measurements: list[dict[str, Any]], path: Path | None = None) -> Path:
    """Write `path`, or benchmarks/results/NAME-DEVICE.json in place of the last result, which git keeps. Return the file."""
    RESULTS.mkdir(exist_ok=True)
    path = path or RESULTS / f"{name}-{device.type}.json"
    record = {"commit": commit(), "machine": machine(device), "measurements": measurements}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path

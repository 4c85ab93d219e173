"""What a measurement was taken on, and how two things are timed side by side."""

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
    """Seconds of each variant in each round, after one that does not count. They take turns, so that
    whatever else the machine does meets all of them."""
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
    """Median over the rounds of one's time by the other's."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
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
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit measured; with + if the tree had changes. `unknown` outside of git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def write(name: str, device: torch.device, measurements: list[dict[str, Any]]) -> Path:
    """benchmarks/results/NAME-DEVICE.json: the newest measurement; git keeps the older ones."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device.type}.json"
    record = {"commit": commit(), "machine": machine(device), "measurements": measurements}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path

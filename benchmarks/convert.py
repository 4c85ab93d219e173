"""Converting a FLUX.1 of full size, beside copying it: what the method adds to what the disk takes.

    python -m benchmarks.convert                        FLUX.1 dev's 23.8 GB; needs 48 GB of disk
    python -m benchmarks.convert --layers 3 6           fewer double and single blocks
    python -m benchmarks.convert --folder /mnt/models   on another disk

copy: the file read and written in large pieces, and made durable. conversion: `python -m d2m_train convert
--importance weight-norm`, the whole command. Both begin with nothing of the file in memory, and take turns. Anonymous
memory is what the command holds itself; the pages of the mapped file are the system's to take back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from .full_size import flux_of, size_of, write_random
from .record import ROOT, commit, machine, median_ratio, write

PIECE = 8 << 20  # bytes copied at a time
SPARE = 1 << 30  # bytes of disk left free, at least
SAMPLING = 0.01  # seconds between two looks at the memory
VARIANTS = {"split only": ["--split-only"], "compressed modulations": []}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--folder", type=Path, help="where the files go (default: the system's folder for such)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)

    dims = flux_of(*args.layers)
    folder = args.folder or Path(tempfile.gettempdir())
    needed, free = 2 * size_of(dims) + SPARE, shutil.disk_usage(folder).free
    if free < needed:
        print(
            f"{folder}: {needed:,} bytes are needed, {free:,} are free. Use --folder, or --layers for a smaller file."
        )
        return 2
    about = machine(torch.device("cpu"))
    print(f"Conversion of {size_of(dims):,} bytes on {about['device']}, {about['cores']} cores; {commit()}\n")
    with tempfile.TemporaryDirectory(prefix="benchmark-convert-", dir=folder) as temporary:
        measurements = measure(Path(temporary), args.layers, args.rounds)
    print("variant                    copy s (cpu)  convert s (cpu)     ratio   peak of anonymous memory")
    for measured in measurements:
        peak = measured["peak_anonymous_bytes"]
        print(
            f"{measured['variant']:24}{measured['copy_seconds']:9.1f} ({measured['copy_cpu_seconds']:3.0f})"
            f"{measured['convert_seconds']:11.1f} ({measured['convert_cpu_seconds']:3.0f})"
            f"{measured['ratio']:10.3f}   {'unknown' if peak is None else f'{peak / 1e9:.2f} GB'}"
        )
    if not args.no_write:
        print(f"\n{write('convert', torch.device('cpu'), measurements)}")
    return 0


def measure(folder: Path, layers: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """One measurement for each of VARIANTS."""
    dense, copied, converted = (folder / f"{name}.safetensors" for name in ("dense", "copy", "moe"))
    write_random(dense, flux_of(*layers))
    copies: list[Seconds] = []
    conversions: dict[str, list[Seconds]] = {variant: [] for variant in VARIANTS}
    peaks: dict[str, int | None] = dict.fromkeys(VARIANTS)
    for _ in range(rounds):
        drop_caches(dense)
        start = Seconds.now()
        copy(dense, copied)
        copies.append(Seconds.now() - start)
        copied.unlink()
        for variant, options in VARIANTS.items():
            drop_caches(dense)
            start = Seconds.now()
            command = ["convert", "--teacher", dense, "--out", converted, "--importance", "weight-norm", *options]
            peak = run_watched([sys.executable, "-m", "d2m_train", *map(str, command)])
            conversions[variant].append(Seconds.now() - start)
            converted.unlink()
            peaks[variant] = max(filter(None, (peaks[variant], peak)), default=None)
    return [
        {
            "variant": variant,
            "bytes": dense.stat().st_size,
            "layers": list(layers),
            "rounds": rounds,
            "copy_seconds": median(copy.wall for copy in copies),
            "copy_cpu_seconds": median(copy.cpu for copy in copies),
            "convert_seconds": median(conversion.wall for conversion in conversions[variant]),
            "convert_cpu_seconds": median(conversion.cpu for conversion in conversions[variant]),
            "ratio": median_ratio([each.wall for each in conversions[variant]], [copy.wall for copy in copies]),
            "peak_anonymous_bytes": peaks[variant],
        }
        for variant in VARIANTS
    ]


class Seconds(NamedTuple):
    """By the clock, and of processors: where the second is far less than its share of the first, others were at work."""

    wall: float
    cpu: float  # of this process and of those it has waited for

    @classmethod
    def now(cls) -> Seconds:
        times = os.times()
        return cls(time.perf_counter(), times.user + times.system + times.children_user + times.children_system)

    def __sub__(self, start: Seconds) -> Seconds:
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


def copy(source: Path, target: Path) -> None:
    """Read and write, as any program would; the system's own copy may share the blocks of the two files."""
    buffer = memoryview(bytearray(PIECE))
    with open(source, "rb", buffering=0) as read, open(target, "xb", buffering=0) as written:
        while count := read.readinto(buffer):
            written.write(buffer[:count])
        os.fsync(written.fileno())


def drop_caches(path: Path) -> None:
    """Nothing of the file stays in memory, nor anything else where the system lets us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_watched(command: list[str]) -> int | None:
    """Run to its end; the peak of its anonymous memory in bytes, or None where the system does not tell."""
    peak = None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if (now := anonymous_memory(process.pid)) is not None:
                peak = max(peak or 0, now)
            time.sleep(SAMPLING)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')[-2000:]}")
    return peak


def anonymous_memory(process: int) -> int | None:
    """RssAnon of a process, in bytes."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return None if line is None else int(line.split()[1]) << 10


if __name__ == "__main__":
    sys.exit(main())

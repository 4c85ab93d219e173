"""Converting a FLUX.1 of full size, compared with copying it: the time that the method adds to that of the disk.

    python -m benchmarks.convert                        FLUX.1 dev's 23.8 GB; needs 48 GB of disk
    python -m benchmarks.convert --layers 3 6           fewer double and single blocks
    python -m benchmarks.convert --folder /mnt/models   on another disk

copy: reads and writes the file in large pieces, and waits until it is on the disk. conversion: the whole command
`python -m d2m_train convert --importance weight-norm`. They take turns, and both start with nothing of the file in memory.
Anonymous memory belongs to the command; the system can free the pages of the mapped file at any time.
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

from .full_size import flux_of, weight_bytes, write_random
from .record import ROOT, commit, machine, median_ratio, write_result

_PIECE = 8 << 20  # bytes copied at a time
_SPARE = 1 << 30  # bytes of disk that stay free
_SAMPLING_INTERVAL = 0.01  # seconds between two measurements of the memory
_VARIANTS = {"split only": ["--split-only"], "compressed modulations": []}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--folder", type=Path, help="folder for the files (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)

    dims = flux_of(*args.layers)
    folder = args.folder or Path(tempfile.gettempdir())
    needed, free = 2 * weight_bytes(dims) + _SPARE, shutil.disk_usage(folder).free
    if free < needed:
        print(
            f"{folder}: {needed:,} bytes are needed, but only {free:,} are free. Use --folder, or --layers for a smaller file."
        )
        return 2
    about = machine(torch.device("cpu"))
    print(f"Conversion of {weight_bytes(dims):,} bytes on {about['device']}, {about['cores']} cores; {commit()}\n")
    with tempfile.TemporaryDirectory(prefix="benchmark-convert-", dir=folder) as temporary:
        measurements = measure_conversion(Path(temporary), args.layers, args.rounds)
    print("variant                    copy s (cpu)  convert s (cpu)     ratio   peak of anonymous memory")
    for measured in measurements:
        peak = measured["peak_anonymous_bytes"]
        print(
            f"{measured['variant']:24}{measured['copy_seconds']:9.1f} ({measured['copy_cpu_seconds']:3.0f})"
            f"{measured['convert_seconds']:11.1f} ({measured['convert_cpu_seconds']:3.0f})"
            f"{measured['ratio']:10.3f}   {'unknown' if peak is None else f'{peak / 1e9:.2f} GB'}"
        )
    if not args.no_write:
        print(f"\n{write_result('convert', torch.device('cpu'), measurements)}")
    return 0


def measure_conversion(folder: Path, layers: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """Measure each of _VARIANTS."""
    dense, copied, converted = (folder / f"{name}.safetensors" for name in ("dense", "copy", "moe"))
    write_random(dense, flux_of(*layers))
    copies: list[Seconds] = []
    conversions: dict[str, list[Seconds]] = {variant: [] for variant in _VARIANTS}
    peaks: dict[str, int | None] = dict.fromkeys(_VARIANTS)
    for _ in range(rounds):
        drop_caches(dense)
        start = Seconds.now()
        copy(dense, copied)
        copies.append(Seconds.now() - start)
        copied.unlink()
        for variant, options in _VARIANTS.items():
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
        for variant in _VARIANTS
    ]


class Seconds(NamedTuple):
    """Time on the clock and of processors. Other work slowed a run down if `cpu` is far below `wall`."""

    wall: float
    cpu: float  # this process and the processes that it has waited for

    @classmethod
    def now(cls) -> Seconds:
        times = os.times()
        return cls(time.perf_counter(), times.user + times.system + times.children_user + times.children_system)

    def __sub__(self, start: Seconds) -> Seconds:
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


def copy(source: Path, target: Path) -> None:
    """Copy by reading and writing. The system's own copy might only share the blocks of the two files."""
    buffer = memoryview(bytearray(_PIECE))
    with open(source, "rb", buffering=0) as read, open(target, "xb", buffering=0) as written:
        while count := read.readinto(buffer):
            written.write(buffer[:count])
        os.fsync(written.fileno())


def drop_caches(path: Path) -> None:
    """Remove the file from memory, and where the system allows it, all other files too."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_watched(command: list[str]) -> int | None:
    """Run a command and return its peak of anonymous memory in bytes; None where the system does not measure it."""
    peak = None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if (now := anonymous_memory(process.pid)) is not None:
                peak = max(peak or 0, now)
            time.sleep(_SAMPLING_INTERVAL)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')[-2000:]}")
    return peak


def anonymous_memory(process: int) -> int | None:
    """Return the anonymous memory (RssAnon) of a process in bytes."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return None if line is None else int(line.split()[1]) << 10


if __name__ == "__main__":
    sys.exit(main())

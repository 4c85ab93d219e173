"""Cost of loading a converted file, before anything is sampled: memory, and bytes that are read from the disk.

    python -m benchmarks.load flux1-dev-moe-L.safetensors

The file is removed from the system's page cache, ComfyUI is started in this process on the CPU, and Load FLUX-MoE loads
the file. The figures come from /proc (Linux): anonymous memory belongs to the process; mapped memory belongs to the file,
and the system can free it at any time.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from demo.in_process import Comfy

from .record import commit, machine, write_result

_DEVICE = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="a FLUX-MoE")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    file: Path = args.file.resolve(strict=True)
    with tempfile.TemporaryDirectory() as base:
        measured = measure_loading(file, Path(base))
    print(f"{commit()}, {machine(_DEVICE)['device']}, {measured['memory_bytes']:,} bytes of memory")
    print(f"file               {measured['file_bytes']:>16,} bytes")
    print(f"anonymous memory   {measured['anonymous_bytes']:>16,} bytes more than before loading")
    print(
        f"mapped             {measured['mapped_bytes']:>16,} bytes of the file, {measured['resident_bytes']:,} in memory"
    )
    print(f"read from the disk {measured['read_bytes']:>16,} bytes")
    if not args.no_write:
        print(write_result("load", _DEVICE, [measured]))
    return 0


def measure_loading(file: Path, base: Path) -> dict[str, Any]:
    """Load `file` in a ComfyUI whose folders lie in `base`, and measure memory and reading."""
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (models / file.name).symlink_to(file)
    host = Comfy(base)
    host.load_pack()
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    before = anonymous_bytes(), read_bytes()
    model = host.run("D2MLoadFluxMoE", model_name=file.name, weight_dtype="default")
    after = anonymous_bytes(), read_bytes()
    mapped, resident = mapping_of(file)
    weight = model.model.diffusion_model.img_in.weight
    return {
        "file_bytes": file.stat().st_size,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "anonymous_bytes": after[0] - before[0],
        "mapped_bytes": mapped,
        "resident_bytes": resident,
        "read_bytes": after[1] - before[1],
    }


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process, in bytes."""
    return 1024 * _number("/proc/self/status", r"RssAnon:\s+(\d+) kB")


def read_bytes() -> int:
    """Return how many bytes this process has read from disks."""
    return _number("/proc/self/io", r"(?m)^read_bytes: (\d+)")


def mapping_of(file: Path) -> tuple[int, int]:
    """Return how many bytes of `file` this process has mapped, and how many of these are in memory."""
    sizes, inside = {"Size": 0, "Rss": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and (match := re.match(r"(Size|Rss):\s+(\d+) kB", line)):
            sizes[match[1]] += 1024 * int(match[2])
    return sizes["Size"], sizes["Rss"]


def _number(path: str, pattern: str) -> int:
    match = re.search(pattern, Path(path).read_text())
    assert match is not None, f"{path} has no line {pattern!r}"
    return int(match[1])


if __name__ == "__main__":
    sys.exit(main())

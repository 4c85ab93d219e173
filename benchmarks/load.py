"""What loading a converted file costs before anything is sampled: memory of the process, and bytes read from the disk.

    python -m benchmarks.load flux1-dev-moe-L.safetensors

The file is taken out of the system's page cache, ComfyUI is started in this process on the CPU, and the file is loaded
by Load FLUX-MoE. Figures come from /proc (Linux): anonymous memory is what the process holds of its own, mapped memory
is the file's, which the system can let go of at any time.
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

from demo.inside import Comfy

from .record import commit, machine, write

DEVICE = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="a FLUX-MoE")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    file: Path = args.file.resolve(strict=True)
    with tempfile.TemporaryDirectory() as base:
        found = measure(file, Path(base))
    print(f"{commit()}, {machine(DEVICE)['device']}, {found['memory_bytes']:,} bytes of memory")
    print(f"file               {found['file_bytes']:>16,} bytes")
    print(f"anonymous memory   {found['anonymous_bytes']:>16,} bytes more than before loading")
    print(
        f"mapped             {found['mapped_bytes']:>16,} bytes of the file, {found['resident_bytes']:,} of them in memory"
    )
    print(f"read from the disk {found['read_bytes']:>16,} bytes")
    if not args.no_write:
        print(write("load", DEVICE, [found]))
    return 0


def measure(file: Path, base: Path) -> dict[str, Any]:
    """Load `file` in a ComfyUI that has its folders in `base`."""
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (models / file.name).symlink_to(file)
    host = Comfy(base)
    host.load_pack()
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    before = anonymous(), read_bytes()
    model = host.run("D2MLoadFluxMoE", model_name=file.name, weight_dtype="default")
    after = anonymous(), read_bytes()
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


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    return 1024 * _number("/proc/self/status", r"RssAnon:\s+(\d+) kB")


def read_bytes() -> int:
    """Bytes that this process has made the system fetch from disks."""
    return _number("/proc/self/io", r"(?m)^read_bytes: (\d+)")


def mapping_of(file: Path) -> tuple[int, int]:
    """Bytes of `file` that this process has mapped, and those of them that are in memory."""
    sizes, inside = {"Size": 0, "Rss": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and (match := re.match(r"(Size|Rss):\s+(\d+) kB", line)):
            sizes[match[1]] += 1024 * int(match[2])
    return sizes["Size"], sizes["Rss"]


def _number(path: str, pattern: str) -> int:
    match = re.search(pattern, Path(path).read_text())
    assert match is not None, f"{path} does not tell"
    return int(match[1])


if __name__ == "__main__":
    sys.exit(main())

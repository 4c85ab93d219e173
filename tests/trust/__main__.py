"""Standing tests of trust, an hour in all: files, requests, prompts, kills and packages.

    python -m tests.trust                              every part
    python -m tests.trust files --count 2000 --seed 3  one of them

Each part ends at its first fault, with exit status 1 and the seed that repeats it, and writes its figures to
benchmarks/results/trust-PART.json. docs/reliability.md says what each part does.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# The models are tiny; sums in one order give the same bits.
os.environ["OMP_NUM_THREADS"] = "1"

COUNTS = {"files": 20_000, "requests": 50_000, "prompts": 500, "kills": 200, "packages": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(COUNTS)}; all of them without")
    parser.add_argument("--count", type=int, help="number of files, requests, prompts or kills (packages: none)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--no-write", action="store_true", help="write no results")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(COUNTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; expected {', '.join(COUNTS)}")
    faulthandler.enable()
    return max(
        [
            run_part(part, args.count or COUNTS[part], args.seed, write=not args.no_write)
            for part in args.parts or COUNTS
        ]
    )


def run_part(part: str, count: int, seed: int, *, write: bool) -> int:
    """Run a part. Return the exit status."""
    import torch

    from benchmarks.record import RESULTS, write_result
    from tests.trust.limits import Fault

    torch.set_num_threads(1)
    start = time.monotonic()
    base = Path(tempfile.gettempdir()) / "d2m-trust"  # where files that show a fault stay
    base.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=base) as folder:
            measured = importlib.import_module(f"tests.trust.{part}").measure(count, seed, Path(folder))
    except Fault as fault:
        print(
            f"FAULT  {part}, {fault}\nRepeat with: python -m tests.trust {part} --count {count} --seed {seed}",
            file=sys.stderr,
        )
        return 1
    measured = {"part": part, "seed": seed, "seconds": round(time.monotonic() - start), **measured}
    print(", ".join(f"{name} {value}" for name, value in measured.items()))
    if write:
        print(write_result("trust", torch.device("cpu"), [measured], RESULTS / f"trust-{part}.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

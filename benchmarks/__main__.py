"""Run every benchmark with its defaults. Each can be run by itself, with options: python -m benchmarks.moe_ffn --help."""

import sys

from . import moe_ffn

if __name__ == "__main__":
    sys.exit(moe_ffn.main([]))

"""Run every benchmark with its defaults. Each can be run by itself, with options: python -m benchmarks.moe_ffn --help."""

import sys

from . import convert, moe_ffn, trace

if __name__ == "__main__":
    sys.exit(moe_ffn.main([]) or trace.main([]) or convert.main([]))

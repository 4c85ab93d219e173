"""Run the benchmarks of speed with their defaults. For options run one alone: python -m benchmarks.moe_ffn --help."""

import sys

from . import convert, moe_ffn, trace, whole_model

if __name__ == "__main__":
    sys.exit(moe_ffn.main([]) or whole_model.main([]) or trace.main([]) or convert.main([]))

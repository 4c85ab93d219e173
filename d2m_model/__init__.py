"""The method of Dense2MoE in pure torch: Mixture of Experts and Mixture of Blocks for FLUX.1."""

VERSION = "0.1.0"  # of the pack, as in pyproject.toml

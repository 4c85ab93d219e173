"""The method of Dense2MoE in pure torch: Mixture of Experts and Mixture of Blocks for FLUX.1."""

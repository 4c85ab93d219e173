"""Dense FLUX -> FLUX-MoE: which neurons matter, which expert they go to, and where tokens go."""

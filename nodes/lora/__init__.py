"""LoRAs of a dense FLUX on the reordered weights of a FLUX-MoE."""

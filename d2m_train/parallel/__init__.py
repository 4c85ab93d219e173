"""One process or many: accelerate, FSDP2 and DeepSpeed."""

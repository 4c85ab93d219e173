"""The training stages, their losses, and one microbatch of distillation (Sec. 3.2)."""

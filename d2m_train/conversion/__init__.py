"""Conversion without training, from the command line and as the first stage of a distillation."""

"""What a training stage trains and compares: stages, losses and one microbatch (Sec. 3.2)."""

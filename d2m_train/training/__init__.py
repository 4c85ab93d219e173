"""The training loop of a stage, and everything that makes it resumable."""

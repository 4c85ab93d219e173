"""The display of a run in training: log, validation, sample images and router statistics."""

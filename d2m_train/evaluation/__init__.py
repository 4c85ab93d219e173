"""Evaluation: sampling prompts with a FLUX, scoring the images, and drawing figures."""

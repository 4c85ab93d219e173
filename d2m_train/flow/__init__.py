"""Flow matching with a FLUX in diffusers: velocities, noise levels and sampling."""

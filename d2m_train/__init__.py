"""`python -m d2m_train`: conversion, inspection and cost of FLUX-MoE files, without ComfyUI."""


class UserError(ValueError):
    """Something that the user can put right; the command line prints the message and nothing else."""

"""`python -m d2m_train`: conversion, inspection and cost of FLUX-MoE files, without ComfyUI."""

import logging

# diffusers looks for tensor types of an older torchao, and warns at every start that it does not find them.
logging.getLogger("diffusers.quantizers.torchao").setLevel(logging.ERROR)


class UserError(ValueError):
    """Something that the user can put right; the command line prints the message and nothing else."""

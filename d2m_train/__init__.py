"""Trainer without ComfyUI: `python -m d2m_train` converts, distils, evaluates and inspects FLUX-MoE files."""

import logging

from d2m_model.foreign import MessageError

# diffusers looks for tensor types of an older torchao and warns at every start that they are missing.
logging.getLogger("diffusers.quantizers.torchao").setLevel(logging.ERROR)


class UserError(MessageError):
    """An error that the user can correct; the command line prints only its message."""

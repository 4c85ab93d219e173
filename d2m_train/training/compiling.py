"""torch.compile of a student's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import UserError


def compile_backend(compiler: bool | str) -> str | None:
    """Return the name of the backend; None for False. Raises UserError for one that torch does not have."""
    if not compiler:
        return None
    backend = "inductor" if compiler is True else str(compiler)
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise UserError(
            f"training.compile is {backend}; expected true, false or a backend of torch: {', '.join(known)}."
        )
    return backend


def compile_blocks(blocks: Sequence[nn.Module], compiler: bool | str) -> None:
    """Compile each block's forward by inductor (True) or another backend; False does nothing.

    Raises UserError for a backend that torch does not have.
    """
    backend = compile_backend(compiler)
    if backend is None:
        return
    # Blocks of a kind share their code, but each may need graphs of its own, for training and for validation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)

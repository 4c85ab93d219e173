"""Refusal of a FLUX-MoE whose blocks another pack has put out of use.

Packs exchange blocks, or their classes, in place, which lasts until the model is loaded anew. Their blocks use the
weights of a routed FFN as a dense FLUX does: every expert runs, whatever the settings are.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ...d2m_model.blocks import FFN
from ...d2m_model.config import FluxMoEConfig
from .block_groups import BlockCompiledApart
from .blocks import ExpertFFN, SingleExpertBlock

_WHAT_TO_DO = (
    "Remove the node that does so, and load the model anew (Edit > Unload Models and Execution Cache): such a change "
    "stays in the loaded model."
)


class ExchangedBlockError(RuntimeError):
    """A block does not route its tokens, because code of another pack runs in its place."""


def check_blocks(flux: Any, config: FluxMoEConfig) -> None:
    """Raise ExchangedBlockError if a block that routes, or belongs to a block group, has become another.

    A block may be wrapped, as by torch.compile, if the wrapper holds it as a submodule.
    """
    for name in config.ffns:
        ffn = FFN.parse(name)
        part = ffn.block.name if ffn.block.kind == "single" else name
        _require(flux, part, SingleExpertBlock if ffn.block.kind == "single" else ExpertFFN)
    for group in config.groups:
        for block in group.members:
            _require(flux, block.name, BlockCompiledApart)


def _require(flux: Any, name: str, own: type) -> None:
    part: Any = flux
    for step in name.split("."):
        part = getattr(part, step)
    if not any(isinstance(module, own) for module in part.modules()):
        foreign = type(part)
        raise ExchangedBlockError(
            f"{name} of this FLUX-MoE was exchanged for a {foreign.__qualname__} (of {foreign.__module__}), with which "
            f"Top-K and the other settings have no effect. {_WHAT_TO_DO}"
        )


def refuse_dense_use(linear: nn.Module, name: str) -> None:
    """Have a linear layer of a routed FFN, which this pack never calls as a module, raise where another pack calls it."""
    linear.register_forward_pre_hook(_DenseUse(name))


class _DenseUse:
    """A hook that raises. A class of its own, so that models stay picklable."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch."):
            frame = frame.f_back
        raise ExchangedBlockError(
            f"{frame.f_code.co_name} (of {frame.f_globals.get('__name__')}) uses {self.name} of this FLUX-MoE as a dense "
            f"layer, in place of the block that chooses experts: Top-K and the other settings have no effect. {_WHAT_TO_DO}"
        )

"""Opening of FLUX files, dense or MoE, for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2m_model.checkpoint import CONFIG_KEY
from d2m_model.tensor_file import TensorFile

from .. import UserError

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


@dataclass(kw_only=True, slots=True, frozen=True)
class Sparsity:
    """Settings of how much of a FLUX-MoE runs; None is the file's own."""

    top_k: int | None = None
    active_blocks: int | None = None
    capacity_factor: float | None = None

    def options(self) -> list[str]:
        """Return the command line options that are set."""
        options = {
            "--top-k": self.top_k,
            "--active-blocks": self.active_blocks,
            "--capacity-factor": self.capacity_factor,
        }
        return [option for option, value in options.items() if value is not None]


def is_flux_moe(path: Path) -> bool:
    """Return whether a path is a FLUX-MoE file. Raises CheckpointError for a file that is not a .safetensors.

    An index or a folder belongs to a dense FLUX's shards.
    """
    if path.suffix == ".json" or not path.is_file():
        return False
    with TensorFile(path) as file:
        return CONFIG_KEY in file.shapes


def load_flux(
    path: Path, dtype: torch.dtype, device: str | torch.device = "cpu", sparsity: Sparsity | None = None
) -> FluxTransformer2DModel:
    """Load a FLUX in eval mode, without gradients.

    Raises CheckpointError for a file that is not a FLUX, UserError for a sparsity that it does not have.
    """
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer
    from d2m_model.hosts.diffusers.modules import GroupRouter

    sparsity = sparsity or Sparsity()
    if not is_flux_moe(path):
        if sparsity.options():
            raise UserError(f"{path} is a dense FLUX; {', '.join(sparsity.options())} need a FLUX-MoE.")
        return load_transformer(path, dtype, device).requires_grad_(False)
    model = FluxMoETransformer2DModel.from_flux_moe(path, dtype, device)
    config = model.flux_moe
    for option, value in (("--top-k", sparsity.top_k), ("--capacity-factor", sparsity.capacity_factor)):
        if value is not None and option != config.router.option:
            raise UserError(f"{path} has {config.router.named}; use {config.router.option} in place of {option}.")
    if sparsity.top_k is not None:
        try:
            model.set_top_k(sparsity.top_k)
        except ValueError as error:
            raise UserError(f"--top-k: {error}") from None
    if sparsity.capacity_factor is not None:
        if sparsity.capacity_factor < 0:
            raise UserError(f"--capacity-factor is {sparsity.capacity_factor}; expected 0 or more.")
        model.set_capacity_factor(sparsity.capacity_factor)
    if sparsity.active_blocks is not None:
        fewest = min((group.blocks for group in config.groups), default=0)
        if not 0 <= sparsity.active_blocks <= fewest:
            has = f"groups of {fewest} blocks or more" if config.groups else "no block groups"
            raise UserError(f"--active-blocks is {sparsity.active_blocks}, but {path} has {has}.")
        for group in model.block_groups:
            assert isinstance(group, GroupRouter)
            group.active = sparsity.active_blocks
    frozen: FluxTransformer2DModel = model.requires_grad_(False)
    return frozen

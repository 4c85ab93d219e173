"""A stage's student from its file: prepared on the meta device first, and then filled tensor by tensor.

So every weight has its final dtype from the start, and each rank reads its own part of a sharded one: no device ever holds the
whole student in the dtype of trained weights.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from torch import nn

from d2m_model.tensor_file import TensorFile

from ..distillation.stages import StagePlan, plan_stage, prepare_student
from ..parallel.parameters import with_values
from .stage_run import StageRun

if TYPE_CHECKING:
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel


def meta_student(stage_run: StageRun) -> tuple[FluxMoETransformer2DModel, StagePlan]:
    """Return the stage's student without values, frozen and switched as its plan says, and that plan."""
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

    core = FluxMoETransformer2DModel.from_flux_moe(stage_run.source, stage_run.dtype, "meta")
    plan = plan_stage(stage_run.stage, core.flux_moe, stage_run.section)
    prepare_student(core, plan, stage_run.run.student.frozen_dtype)
    return core, plan


def fill_student(core: FluxMoETransformer2DModel, stage_run: StageRun, only: Container[str] | None = None) -> None:
    """Give a student that `meta_student` made, sharded or not, its values from the stage's source.

    With `only`, those tensors of the file alone; the others stay without values.
    """
    from d2m_model.hosts.diffusers.tensor_map import tensor_map

    device = stage_run.ranks.device
    with TensorFile(stage_run.source) as file:
        for name, slices in tensor_map(core.flux_moe, core.optional).items():
            if only is not None and name not in only:
                continue
            stored = file.tensor(name)
            for part in slices:
                owner, _, attribute = part.name.rpartition(".")
                module = core.get_submodule(owner)
                empty = getattr(module, attribute)
                tensor = with_values(empty, part.to_model(stored), device)
                if isinstance(empty, nn.Parameter):
                    tensor = nn.Parameter(tensor, empty.requires_grad)
                setattr(module, attribute, tensor)
            file.release(name)

"""The new tensors of a conversion, decided by a method with or without a calibration.

The functions add what they measure to `measured`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..blocks import is_modulation
from ..config import FluxMoEConfig
from ..keys import dense_shapes
from .adaln import FittedModulations, VecMoments
from .block_routers import GroupReport, plan_block_routers, random_block_routers_of
from .calibration import Calibration
from .depth_pruning import TeacherBlocks, teacher_name
from .ffn import FFNReport, plan_with_data, plan_without_data
from .importance import activation_importance, weight_norm_importance
from .interfaces import FFNPlan, FFNWeights
from .method import Method, MethodError
from .stand_in_fit import fit_stand_ins


def block_group_tensors(
    method: Method,
    config: FluxMoEConfig,
    calibration: Calibration | None,
    measured: dict[str, GroupReport],
    stand_in_errors: dict[str, float],
) -> dict[str, Tensor]:
    """Return routers and stand-ins of all groups by their names in the file. Raises MethodError for too few samples."""
    tensors: dict[str, Tensor] = {}
    for index, group in enumerate(config.groups):
        name, seed = f"block_groups.{index}", method.recipe.seed
        if calibration is None:
            routers = random_block_routers_of(name, group, config.dims.hidden_size, seed)
        else:
            try:
                seen = calibration.group(group)
                if config.stand_in_rank is not None:
                    fitted = fit_stand_ins(name, group, calibration, config.stand_in_rank)
                    tensors |= fitted.tensors
                    stand_in_errors |= fitted.errors
                    seen = replace(seen, change_nM=fitted.left_BM)
                routers, measured[name] = plan_block_routers(name, group, seen, method.block_router, seed)
            except ValueError as error:
                raise MethodError(f"{name}: {error}") from None
        tensors |= {f"{name}.router_x.weight": routers.x_MH, f"{name}.router_y.weight": routers.y_MH}
    return tensors


def fitted_modulations(
    tensor: Callable[[str], Tensor], config: FluxMoEConfig, calibration: Calibration | None
) -> FittedModulations | None:
    """Fit the AdaLN compression of `config`; None without one. `tensor` returns the teacher's tensors by name."""
    if config.adaln_rank is None:
        return None
    names = [name for name in dense_shapes(config.dims) if is_modulation(name.removesuffix(".weight"))]
    moments = VecMoments.unknown(config.dims.hidden_size) if calibration is None else calibration.moments()
    return FittedModulations(moments, map(tensor, names), config.adaln_rank)


def planner(
    method: Method,
    config: FluxMoEConfig,
    calibration: Calibration | None,
    measured: dict[str, FFNReport],
    *,
    device: torch.device,
    kept: TeacherBlocks | None = None,
) -> Callable[[str, FFNWeights], FFNPlan]:
    """Return the PlanFFN of a conversion. FFNs are fitted on `device`; `kept` are the blocks of a pruned teacher."""

    def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
        recipe, layout = method.recipe, config.ffns[ffn]
        if config.top_k == 0:
            recipe = replace(recipe, top_k=0)  # MLP pruning: only the shared expert is refitted
        source = ffn if kept is None else teacher_name(ffn, kept)
        if calibration is None:
            return plan_without_data(ffn, weights, layout, weight_norm_importance(*_parts(weights)), recipe)
        inputs_TH = calibration.inputs(source).to(device)
        if method.taylor:
            importance_N = calibration.importance(source)
        elif method.importance == "activation":
            importance_N = activation_importance(*_parts(weights), inputs_TH)
        else:
            importance_N = weight_norm_importance(*_parts(weights))
        planned, measured[ffn] = plan_with_data(ffn, weights, layout, importance_N, inputs_TH, recipe)
        return planned

    return plan


def _parts(weights: FFNWeights) -> tuple[Tensor, Tensor, Tensor]:
    return weights.up_NH, weights.up_bias_N, weights.down_HN

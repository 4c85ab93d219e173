"""The training stages: what each of them trains, what it compares, and how the student runs in it (Sec. 3.2).

`shared` trains the shared experts as a pruned model of their own, with the routed experts off. `experts` freezes the
shared experts and trains the routed ones and their routers. `blocks` trains the block groups alone; only from this stage
on do groups choose among their blocks, all of which run before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from d2m_model.blocks import DIFFUSERS_BLOCKS, Block, BlockKind
from d2m_model.config import FluxMoEConfig, Gate

from .. import UserError
from ..run_config import Dtype, Stage, StageSection

if TYPE_CHECKING:
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel

TRAINING: tuple[Stage, ...] = ("shared", "experts", "blocks")

# Sec. 4.1: modulations, and the matrix U of their compression
MODULATIONS = (
    "adaln_in.*",
    "*.norm1.linear.*",
    "*.norm1_context.linear.*",
    f"{DIFFUSERS_BLOCKS['single']}.*.norm.linear.*",
)
SHARED = ("*.shared_up.*", "*.shared_down.*")
ROUTED = ("*.routed_*", "*.router.*", "*.expert_mean", "*.capacity.*")


@dataclass(kw_only=True, slots=True, frozen=True)
class Feature:
    """A block output of the student and the teacher's output that it learns (Eq. 8). Blocks have BFL names."""

    student: str
    teacher: str


@dataclass(kw_only=True, slots=True, frozen=True)
class StagePlan:
    """One stage of one student. `trainable` are fnmatch patterns of parameter names; `config` is the student's after it."""

    stage: Stage
    config: FluxMoEConfig
    trainable: tuple[str, ...]
    features: tuple[Feature, ...]
    experts_on: bool
    groups_on: bool
    token_balance: bool
    block_balance: bool


def trainable_stages(config: FluxMoEConfig) -> tuple[Stage, ...]:
    """The training stages that have something to train: `shared` needs converted FFNs or modulations, `experts` a
    router, `blocks` groups or blocks that stand for several of the teacher's."""
    stages: list[Stage] = ["shared"] if config.ffns or config.adaln_rank is not None else []
    if config.router_value > 0:
        stages.append("experts")
    if config.groups or _stand_ins(config):
        stages.append("blocks")
    return tuple(stages)


def plan_stage(stage: Stage, config: FluxMoEConfig, section: StageSection) -> StagePlan:
    """Return how a stage runs. The section's `trainable` patterns, where it has some, replace the stage's own."""
    if stage not in TRAINING:
        raise ValueError(f"Stage {stage} trains nothing; expected one of {', '.join(TRAINING)}.")
    trainable: tuple[str, ...]
    if stage == "shared":
        trainable = SHARED + (MODULATIONS if config.adaln_rank is not None else ())
    elif stage == "experts":
        trainable = ROUTED
    else:
        trainable = (*_patterns_of_blocks(config), "block_groups.*")
    routed = config.router_value > 0
    return StagePlan(
        stage=stage,
        config=_config_after(stage, config),
        trainable=trainable if section.trainable is None else section.trainable,
        features=group_features(config) if stage == "blocks" else block_features(config),
        experts_on=routed and stage != "shared",
        groups_on=stage == "blocks",
        token_balance=routed and stage == "experts" and config.router.balanced,
        block_balance=stage == "blocks" and bool(config.groups),
    )


def _config_after(stage: Stage, config: FluxMoEConfig) -> FluxMoEConfig:
    """Return the configuration that the stage leaves: from `experts` on, normalised gates, so that routers learn."""
    config = replace(config, split_only=False)
    if stage != "shared" and config.gate.mode == "sum" and config.top_k > 0:
        config = replace(config, gate=Gate(mode="normalised", scale=float(config.top_k)))
    return config


def trainable_names(model: nn.Module, plan: StagePlan) -> set[str]:
    """Names of the parameters that a stage trains. Raises UserError if there are none, or if a pattern matches none."""
    names = [name for name, _ in model.named_parameters()]
    trainable: set[str] = set()
    for pattern in plan.trainable:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching and pattern not in (*MODULATIONS, *SHARED, *ROUTED, "block_groups.*"):
            raise UserError(
                f"stage.{plan.stage}.trainable: {pattern!r} is no parameter of this student; names are such as {names[0]}."
            )
        trainable |= matching
    if plan.stage == "blocks" and not plan.experts_on:  # pruned FFNs, whose experts never run
        trainable = {name for name in trainable if not any(fnmatchcase(name, pattern) for pattern in ROUTED)}
    if not trainable:
        raise UserError(f"Stage {plan.stage} has nothing to train; leave it out of `stages`, or give it patterns.")
    return trainable


def prepare_student(model: FluxMoETransformer2DModel, plan: StagePlan, frozen_dtype: Dtype | None = None) -> None:
    """Freeze what the stage does not train, switch experts and groups on or off, and set the gates.

    `frozen_dtype` is the dtype of frozen weights (None: as they are). Routers, means and U keep theirs.
    """
    trainable = trainable_names(model, plan)
    dtype: torch.dtype | None = None if frozen_dtype is None else getattr(torch, frozen_dtype)
    kept = tuple(pattern for pattern in (*ROUTED, "block_groups.*", "adaln_in.*") if pattern != "*.routed_*")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
        if dtype is not None and name not in trainable and not any(fnmatchcase(name, k) for k in kept):
            parameter.data = parameter.data.to(dtype)
    model.groups_on = plan.groups_on
    for moe in model.moe_ffns().values():
        moe.experts_on = plan.experts_on
        moe.gate = plan.config.gate


# Features


def block_features(config: FluxMoEConfig) -> tuple[Feature, ...]:
    """Every block's output, except for blocks before the first changed one, whose output is exactly the teacher's."""
    blocks = config.dims.blocks
    if config.adaln_rank is None:  # compressed modulations change every block
        changed = [number for number, block in enumerate(blocks) if _is_changed(config, block)]
        blocks = blocks[min(changed, default=len(blocks)) :]
    return _features(config, blocks)


def group_features(config: FluxMoEConfig) -> tuple[Feature, ...]:
    """The output of each group's last block, or of the block that stands in for a pruned group."""
    return _features(config, [group.members[-1] for group in config.groups] + _stand_ins(config))


def _features(config: FluxMoEConfig, blocks: Sequence[Block]) -> tuple[Feature, ...]:
    outputs = teacher_outputs(config)
    return tuple(
        Feature(student=block.name, teacher=Block(block.kind, outputs[block.kind][block.index]).name)
        for block in blocks
    )


def _is_changed(config: FluxMoEConfig, block: Block) -> bool:
    return any(block in group.members for group in config.groups) or any(ffn.name in config.ffns for ffn in block.ffns)


def teacher_outputs(config: FluxMoEConfig) -> Mapping[BlockKind, list[int]]:
    """Indices, by kind, of the teacher's blocks whose outputs the student's blocks learn: the same indices, unless depth
    pruning has renumbered the student's."""
    pruned: Mapping[str, list[int]] = config.provenance.get("teacher_outputs") or {}
    return {kind: list(pruned.get(kind) or range(depth)) for kind, depth in config.dims.depths.items()}


def _stand_ins(config: FluxMoEConfig) -> list[Block]:
    """The blocks of a depth-pruned student that stand for several of the teacher's."""
    blocks = []
    for kind, outputs in teacher_outputs(config).items():
        before = [-1, *outputs[:-1]]
        blocks += [
            Block(kind, index) for index, (last, now) in enumerate(zip(before, outputs, strict=True)) if now > last + 1
        ]
    return blocks


def _patterns_of_blocks(config: FluxMoEConfig) -> tuple[str, ...]:
    grouped = [block for group in config.groups for block in group.members] + _stand_ins(config)
    return tuple(f"{block.diffusers_name}.*" for block in grouped)

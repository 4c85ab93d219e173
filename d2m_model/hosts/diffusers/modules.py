"""Modules that replace or join those of diffusers' FLUX in a FLUX-MoE.

Shapes: B batch, H hidden size, A rank of the compression, O modulation outputs, M blocks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...adaln import compress
from ...config import BlockGroup
from ...mob import BlockRouting, SampleSubset, route_blocks, samples_per_block
from ...moe import MoEFFN, RouterLinear, recomputed
from ...stand_ins import BlockStandIns, group_stand_ins, stand_in_shapes


class SingleExpertOut(nn.Module):
    """A single block's proj_out with a routed FFN. Takes [attention, normed input] instead of [attention, hidden].

    The block's own forward passes that input when its proj_mlp and act_mlp are identities.
    """

    def __init__(self, attention: nn.Linear, moe: MoEFFN) -> None:
        super().__init__()
        self.attention = attention  # without a bias: the bias of proj_out is the FFN's
        self.moe = moe

    def forward(self, both: Tensor) -> Tensor:
        attention, x = both.chunk(2, dim=-1)
        out: Tensor = self.attention(attention) + self.moe(x)
        return out


class AdaLNIn(nn.Linear):
    """U of the AdaLN compression, multiplied in float32 (adaln.compress)."""

    def forward(self, silu_vec: Tensor) -> Tensor:
        return compress(silu_vec, self.weight)


class CompressedModulation(nn.Module):
    """A modulation lin'(U silu(vec)) in place of lin(silu(vec)) (Sec. 4.1). All share U, the model's `adaln_in`."""

    def __init__(self, adaln_in: AdaLNIn, outputs: int) -> None:
        super().__init__()
        self._adaln_in = (adaln_in,)  # not a child: it belongs to the model
        # Parameters of this module itself: those of a child module would have the child's name in theirs.
        lin = nn.Linear(adaln_in.out_features, outputs, device=adaln_in.weight.device)
        self.weight, self.bias = lin.weight, lin.bias

    def forward(self, silu_vec: Tensor) -> Tensor:
        return F.linear(self._adaln_in[0](silu_vec), self.weight, self.bias)


# Mixture of Blocks


class GroupRouter(nn.Module):
    """The router of one group of blocks (Eq. 5): parameters `router_x` and `router_y` [M, H].

    active, selection  how many blocks run, 0 ... M, and how they are chosen; may be set between two forward passes
    routing            the last choice in training, for the losses; None in eval() and after it is set to None
    compares           in training, every block also runs on the group's own input where it was not chosen (with active = 1,
                       and without stand-ins, which would change that input from block to block)
    compared           then: what the last forward pass gave for it, for the losses
    stand_ins          of the group's blocks, by position; None if the file has none
    """

    routing: BlockRouting | None
    compared: GroupOutputs | None

    def __init__(self, index: int, group: BlockGroup, hidden_size: int, stand_in_rank: int | None) -> None:
        super().__init__()
        self.active, self.selection, self.routing = group.active, group.selection, None
        self.compares, self.compared = False, None
        self.router_x = RouterLinear(hidden_size, group.blocks, bias=False)
        self.router_y = RouterLinear(hidden_size, group.blocks, bias=False)

        self.stand_ins: nn.ModuleList | None = None
        if stand_in_rank is not None:
            shapes = stand_in_shapes(index, group, hidden_size, stand_in_rank)

            def linear(name: str) -> nn.Linear:
                outputs, inputs = shapes[f"{name}.weight"]
                return StandInLinear(inputs, outputs, bias=f"{name}.bias" in shapes)

            self.stand_ins = group_stand_ins(index, group, linear)

    def forward(self, x_mean_BH: Tensor, vec_BH: Tensor) -> BlockRouting:
        (router_x_MH, _), (router_y_MH, _) = self.router_x(), self.router_y()
        routing = route_blocks(x_mean_BH, vec_BH, router_x_MH, router_y_MH, self.active, self.selection)
        if not (self.training and recomputed()):
            self.routing = routing if self.training else None
        return routing


class StandInLinear(nn.Linear):
    """A layer of a stand-in, with weights in the file's dtype, multiplied in the stream's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@dataclass(kw_only=True, slots=True, frozen=True)
class GroupOutputs:
    """The streams (text, image) ahead of a group, without their graph, and after each of its blocks alone, with it."""

    given: tuple[Tensor, ...]
    after: list[tuple[Tensor, ...]]


@dataclass(kw_only=True, slots=True, frozen=True)
class GroupMember:
    """A block's position in a group; `group` is the group's number."""

    group: int
    position: int


class GroupRoutings:
    """The choices of the block groups in one forward pass of the model. Passed to every block, kept by none.

    Not a dataclass: FSDP2 copies dataclasses among a block's arguments, so that every block would have its own.
    """

    def __init__(self, routers: nn.ModuleList) -> None:
        self.routers = routers
        self.by_group: dict[int, BlockRouting] = {}
        self._samples: dict[int, list[SampleSubset]] = {}  # in eval()
        self._compared: dict[int, GroupOutputs] = {}  # in train()

    def route(self, group: int, x_mean_BH: Tensor, vec_BH: Tensor) -> BlockRouting:
        """Choose a group's blocks, before its first block runs.

        Gradient checkpointing runs that block again and must find the same computation, so the router runs again too.
        Its second choice is discarded: the other blocks and the losses have the first.
        """
        routing: BlockRouting = self.routers[group](x_mean_BH, vec_BH)
        return self.by_group.setdefault(group, routing)

    def comparing(self, member: GroupMember, streams: tuple[Tensor, ...]) -> GroupOutputs | None:
        """Return what the member's group has given so far, if its router compares blocks. `streams` are the member's input."""
        router: Any = self.routers[member.group]
        if not (router.compares and router.training and router.active == 1 and router.stand_ins is None):
            return None
        if member.group not in self._compared:
            given = tuple(stream.detach() for stream in streams)
            self._compared[member.group] = router.compared = GroupOutputs(given=given, after=[])
        return self._compared[member.group]

    def skipped(self, member: GroupMember, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (text, image) of samples that skip a block."""
        router: Any = self.routers[member.group]
        if router.stand_ins is None:
            return streams
        by_stream: BlockStandIns = router.stand_ins[member.position]
        text, image = by_stream.skip(streams, ("txt", "img") if "img" in by_stream else ("joint", "joint"))
        return text, image

    def samples(self, member: GroupMember) -> SampleSubset:
        """Return the samples that chose a block."""
        if member.group not in self._samples:
            self._samples[member.group] = samples_per_block(self.by_group[member.group])
        return self._samples[member.group][member.position]

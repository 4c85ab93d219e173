"""What a FLUX-MoE has in place of, or beside, the modules of diffusers' FLUX.

Shapes: B batch, H hidden size, A rank of the compression, O modulation outputs, M blocks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...adaln import compress
from ...config import BlockGroup
from ...mob import BlockRouting, Samples, route_blocks, samples_of
from ...moe import MoEFFN, RouterLinear, recomputed


class SingleExpertOut(nn.Module):
    """A single block's proj_out with its MLP routed: on [attention, normed input] instead of [attention, hidden].

    The block's own forward hands it that when its proj_mlp and act_mlp are identities.
    """

    def __init__(self, attention: nn.Linear, moe: MoEFFN) -> None:
        super().__init__()
        self.attention = attention  # without bias, which is the MLP's
        self.moe = moe

    def forward(self, both: Tensor) -> Tensor:
        attention, x = both.chunk(2, dim=-1)
        out: Tensor = self.attention(attention) + self.moe(x)
        return out


class AdaLNIn(nn.Linear):
    """U of the AdaLN compression, in float32 if it can be: multiplied in it, as everywhere."""

    def forward(self, silu_vec: Tensor) -> Tensor:
        return compress(silu_vec, self.weight)


class CompressedModulation(nn.Module):
    """lin'(U silu(vec)) in place of lin(silu(vec)) (Sec. 4.1). U is the model's `adaln_in`, one for all of them."""

    def __init__(self, adaln_in: AdaLNIn, outputs: int) -> None:
        super().__init__()
        self._adaln_in = (adaln_in,)  # not a child: it belongs to the model
        # Parameters of its own, since a child's name would stand in theirs.
        lin = nn.Linear(adaln_in.out_features, outputs, device=adaln_in.weight.device)
        self.weight, self.bias = lin.weight, lin.bias

    def forward(self, silu_vec: Tensor) -> Tensor:
        return F.linear(self._adaln_in[0](silu_vec), self.weight, self.bias)


# Mixture of Blocks


class BlockGroupRouter(nn.Module):
    """The router of one group of blocks (Eq. 5): parameters `router_x` and `router_y` [M, H].

    active, selection  how many blocks run, 0 ... M, and how they are chosen; may be set between two forwards
    routing            in training the last choice, for the losses, until it is set to None; None otherwise
    """

    routing: BlockRouting | None

    def __init__(self, group: BlockGroup, hidden_size: int) -> None:
        super().__init__()
        self.active, self.selection, self.routing = group.active, group.selection, None
        self.router_x = RouterLinear(hidden_size, group.blocks, bias=False)
        self.router_y = RouterLinear(hidden_size, group.blocks, bias=False)

    def forward(self, x_mean_BH: Tensor, vec_BH: Tensor) -> BlockRouting:
        (router_x_MH, _), (router_y_MH, _) = self.router_x(), self.router_y()
        routing = route_blocks(x_mean_BH, vec_BH, router_x_MH, router_y_MH, self.active, self.selection)
        if not (self.training and recomputed()):
            self.routing = routing if self.training else None
        return routing


@dataclass(kw_only=True, slots=True, frozen=True)
class Member:
    """Which block of which group a block is."""

    group: int
    block: int


class Choices:
    """What the groups' routers chose in one forward of the model. Handed to every block, kept by nobody.

    No dataclass: FSDP2 copies those that it finds among a block's arguments, and every block would have its own.
    """

    def __init__(self, routers: nn.ModuleList) -> None:
        self.routers = routers
        self.routings: dict[int, BlockRouting] = {}
        self.samples: dict[int, list[Samples]] = {}  # in eval()

    def route(self, group: int, x_mean_BH: Tensor, vec_BH: Tensor) -> BlockRouting:
        """The choice ahead of a group's first block.

        A checkpoint that runs that block again must find the same computation, so it is made again, and not used: the
        other blocks and the losses have the first.
        """
        routing: BlockRouting = self.routers[group](x_mean_BH, vec_BH)
        return self.routings.setdefault(group, routing)

    def samples_of(self, member: Member) -> Samples:
        if member.group not in self.samples:
            self.samples[member.group] = samples_of(self.routings[member.group])
        return self.samples[member.group][member.block]

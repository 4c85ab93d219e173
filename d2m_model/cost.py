"""Cost of a FLUX or a FLUX-MoE: parameters, activated parameters, FLOPs. Each kind of layer states its own.

FLOPs are 2 per multiply-accumulate of every linear layer on the tokens that it processes, plus 4 T^2 H of attention
in each block (T image and text tokens). Activated parameters are counted twice:
- `touched`: every parameter that takes part in one image's forward pass;
- `paper`: as Table 1 counts them (found by matching its figures): one stream's MoE FFN for each double block; no
  timestep, guidance and pooled-text embedders, no final modulation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .blocks import Block
from .config import MLP_RATIO, BlockGroup, FFNLayout, FluxDims, FluxMoEConfig
from .keys import HEAD, TIME_CHANNELS
from .routers import TOP_K_ROUTER, TokenRouter
from .stand_ins import streams_of


@dataclass(kw_only=True, slots=True, frozen=True)
class Tokens:
    """Tokens of one forward pass. 1024 x 1024 pixels are 4,096 image tokens (16 x 16 pixels each)."""

    image: int
    text: int

    @property
    def joint(self) -> int:
        return self.image + self.text


@dataclass(kw_only=True, slots=True, frozen=True)
class Cost:
    """Parameters held (`total`), activated (`touched`, `paper`), and FLOPs of one forward pass of one image.

    Averages over a block group's choices are fractions.
    """

    total: float = 0
    touched: float = 0
    paper: float = 0
    flops: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            total=self.total + other.total,
            touched=self.touched + other.touched,
            paper=self.paper + other.paper,
            flops=self.flops + other.flops,
        )

    def activated(self, fraction: float) -> Cost:
        """Return the cost if everything is held and `fraction` of it runs."""
        return Cost(
            total=self.total,
            touched=self.touched * fraction,
            paper=self.paper * fraction,
            flops=self.flops * fraction,
        )

    def not_in_paper(self) -> Cost:
        return dataclasses.replace(self, paper=0)


# Layers


def parameters(count: int) -> Cost:
    """Cost of parameters outside of linear layers, such as a norm's scales; their FLOPs are not counted."""
    return Cost(total=count, touched=count, paper=count)


def linear(inputs: int, outputs: int, tokens: float, *, bias: bool = True) -> Cost:
    return dataclasses.replace(parameters(inputs * outputs + bias * outputs), flops=2 * inputs * outputs * tokens)


def attention(hidden: int, tokens: Tokens) -> Cost:
    """Cost of scores and weighted values. The projections are separate linear layers."""
    return Cost(flops=4 * tokens.joint**2 * hidden)


def embedder(inputs: int, hidden: int) -> Cost:
    """Two linear layers on one vector."""
    return linear(inputs, hidden, 1) + linear(hidden, hidden, 1)


def modulation(hidden: int, outputs: int, adaln_rank: int | None) -> Cost:
    """`mod.lin` on one vector, compressed if there is a rank (Sec. 4.1)."""
    return linear(adaln_rank or hidden, outputs * hidden, 1)


def ffn(
    hidden: int, layout: FFNLayout | None, experts_per_token: float, tokens: int, router: TokenRouter = TOP_K_ROUTER
) -> Cost:
    """A dense FFN, or a MoE FFN: shared expert, router, and the experts that a token has on average (Eq. 2)."""
    if layout is None:
        return linear(hidden, MLP_RATIO * hidden, tokens) + linear(MLP_RATIO * hidden, hidden, tokens)
    shared = linear(hidden, layout.shared, tokens) + linear(layout.shared, hidden, tokens)
    experts = linear(hidden, layout.experts * layout.width, tokens) + linear(
        layout.experts * layout.width, hidden, tokens, bias=False
    )
    return shared + token_router(hidden, layout, router, tokens) + experts.activated(experts_per_token / layout.experts)


def token_router(hidden: int, layout: FFNLayout, router: TokenRouter, tokens: int) -> Cost:
    """The router of a MoE FFN, on every token."""
    held = parameters(router.parameters(hidden, layout.experts))
    return dataclasses.replace(held, flops=router.flops(hidden, layout.experts) * tokens)


# Blocks


@dataclass(kw_only=True, slots=True, frozen=True)
class Conversion:
    """Changes to a dense FLUX; `DENSE` has none. `experts_per_token` is a mean where tokens differ.

    FFNs in `experts_by_ffn` have their own number of experts per token.
    """

    ffns: Mapping[str, FFNLayout]
    groups: Sequence[BlockGroup]
    adaln_rank: int | None
    experts_per_token: float
    router: TokenRouter = TOP_K_ROUTER
    stand_in_rank: int | None = None
    experts_by_ffn: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: FluxMoEConfig,
        router_value: float | None = None,
        *,
        active_blocks: Sequence[int] | None = None,
        experts_by_ffn: Mapping[str, float] | None = None,
    ) -> Conversion:
        """Changes of a file. `router_value` is the value of the router's setting, `active_blocks` are numbers of each
        group's blocks; None takes the file's own. `experts_by_ffn` replaces the value for the FFNs that it has."""
        value = config.router_value if router_value is None else router_value
        active = [group.active for group in config.groups] if active_blocks is None else active_blocks
        return cls(
            ffns=config.ffns,
            groups=[dataclasses.replace(group, active=n) for group, n in zip(config.groups, active, strict=True)],
            adaln_rank=config.adaln_rank,
            experts_per_token=config.router.experts_per_token(value, config.fewest_experts),
            router=config.router,
            stand_in_rank=config.stand_in_rank,
            experts_by_ffn=experts_by_ffn or {},
        )

    def ffn(self, name: str, hidden: int, tokens: int) -> Cost:
        """Cost of one FFN by its name."""
        experts = self.experts_by_ffn.get(name, self.experts_per_token)
        return ffn(hidden, self.ffns.get(name), experts, tokens, self.router)


DENSE = Conversion(ffns={}, groups=(), adaln_rank=None, experts_per_token=0)


def double_block(dims: FluxDims, index: int, conversion: Conversion, tokens: Tokens) -> Cost:
    hidden = dims.hidden_size
    cost = attention(hidden, tokens)
    for block_ffn in Block("double", index).ffns:
        stream, length = block_ffn.stream, tokens.image if block_ffn.stream == "img" else tokens.text
        layout = conversion.ffns.get(block_ffn.name)
        mlp = conversion.ffn(block_ffn.name, hidden, length)
        cost += (
            modulation(hidden, 6, conversion.adaln_rank)
            + linear(hidden, 3 * hidden, length)
            + parameters(2 * HEAD)
            + linear(hidden, hidden, length)
            + (mlp.not_in_paper() if stream == "txt" and layout is not None else mlp)
        )
    return cost


def single_block(dims: FluxDims, index: int, conversion: Conversion, tokens: Tokens) -> Cost:
    """Cost of a single block, whose linear1 and linear2 contain an FFN (b2 is linear2's bias)."""
    hidden, length = dims.hidden_size, tokens.joint
    return (
        attention(hidden, tokens)
        + modulation(hidden, 3, conversion.adaln_rank)
        + linear(hidden, 3 * hidden, length)
        + parameters(2 * HEAD)
        + linear(hidden, hidden, length, bias=False)
        + conversion.ffn(Block("single", index).name, hidden, length)
    )


def group_routers(hidden: int, group: BlockGroup) -> Cost:
    """W_x and W_y (Eq. 5), on one vector each."""
    return linear(hidden, group.blocks, 1, bias=False) + linear(hidden, group.blocks, 1, bias=False)


def stand_in(hidden: int, block: Block, rank: int | None, tokens: Tokens) -> Cost:
    """The stand-in of a block that is skipped: W_down and W_up for each of its streams. Nothing without a rank."""
    cost = Cost()
    if rank is None:
        return cost
    for stream in streams_of(block):
        length = {"img": tokens.image, "txt": tokens.text, "joint": tokens.joint}[stream]
        cost += linear(hidden, rank, length, bias=False) + linear(rank, hidden, length)
    return cost


# Model


def flux(dims: FluxDims, conversion: Conversion, tokens: Tokens) -> Cost:
    """Cost of one forward pass. Each of a block group's m blocks runs in active / m of the passes."""
    hidden = dims.hidden_size
    fractions: dict[Block, float] = {}
    cost = (
        linear(dims.in_channels, hidden, tokens.image)
        + linear(dims.context_size, hidden, tokens.text)
        + embedder(TIME_CHANNELS, hidden).not_in_paper()
        + embedder(dims.vector_size, hidden).not_in_paper()
        + linear(hidden, dims.out_channels, tokens.image)
        + linear(hidden, 2 * hidden, 1).not_in_paper()
    )
    if dims.guidance_embed:
        cost += embedder(TIME_CHANNELS, hidden).not_in_paper()
    if conversion.adaln_rank is not None:
        cost += linear(hidden, conversion.adaln_rank, 1, bias=False)
    for group in conversion.groups:
        cost += group_routers(hidden, group)
        fractions |= dict.fromkeys(group.members, group.active / group.blocks)
    for block in dims.blocks:
        cost_of_kind = double_block if block.kind == "double" else single_block
        runs = fractions.get(block, 1)
        cost += cost_of_kind(dims, block.index, conversion, tokens).activated(runs)
        if block in fractions:
            cost += stand_in(hidden, block, conversion.stand_in_rank, tokens).activated(1 - runs)
    return cost

"""What a FLUX or a FLUX-MoE costs: parameters, activated parameters, FLOPs. Each kind of layer states its own.

FLOPs are 2 per multiply-accumulate of every linear layer on the tokens it really sees, plus 4 T^2 H of attention
in each block (T image and text tokens). Activated parameters are counted twice:
- `touched`: every parameter that takes part in one image's forward pass;
- `paper`: as Table 1 counts them (found by matching its figures): one stream's MoE FFN for each double block; no
  timestep, guidance and pooled-text embedders, no final modulation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .blocks import Block
from .config import MLP_RATIO, BlockGroup, CapacityRouter, FFNLayout, FluxDims, FluxMoEConfig
from .keys import HEAD, TIME_CHANNELS


@dataclass(kw_only=True, slots=True, frozen=True)
class Tokens:
    """Length of one forward pass. 1024 x 1024 pixels are 4,096 image tokens (16 x 16 pixels each)."""

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
        """All of it held, `fraction` of it run."""
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
    """Parameters that no linear layer holds, such as a norm's scales; their FLOPs are not counted."""
    return Cost(total=count, touched=count, paper=count)


def linear(inputs: int, outputs: int, tokens: float, *, bias: bool = True) -> Cost:
    return dataclasses.replace(parameters(inputs * outputs + bias * outputs), flops=2 * inputs * outputs * tokens)


def attention(hidden: int, tokens: Tokens) -> Cost:
    """Scores and weighted values; projections are linear layers of their own."""
    return Cost(flops=4 * tokens.joint**2 * hidden)


def embedder(inputs: int, hidden: int) -> Cost:
    """Two linear layers on one vector."""
    return linear(inputs, hidden, 1) + linear(hidden, hidden, 1)


def modulation(hidden: int, outputs: int, adaln_rank: int | None) -> Cost:
    """`mod.lin` on one vector, compressed if there is a rank (Sec. 4.1)."""
    return linear(adaln_rank or hidden, outputs * hidden, 1)


def ffn(
    hidden: int, layout: FFNLayout | None, top_k: float, tokens: int, capacity_router: CapacityRouter | None = None
) -> Cost:
    """A dense FFN, or a MoE FFN: shared expert, router, and top_k of the experts for each token (Eq. 2).

    With a capacity router, whose predictor comes on top, a token has top_k experts on average.
    """
    if layout is None:
        return linear(hidden, MLP_RATIO * hidden, tokens) + linear(MLP_RATIO * hidden, hidden, tokens)
    shared = linear(hidden, layout.shared, tokens) + linear(layout.shared, hidden, tokens)
    experts = linear(hidden, layout.experts * layout.width, tokens) + linear(
        layout.experts * layout.width, hidden, tokens, bias=False
    )
    routing = router(hidden, layout.experts, tokens)
    if capacity_router is not None:
        routing += capacity_predictor(hidden, layout.experts, capacity_router.width, tokens)
    return shared + routing + experts.activated(top_k / layout.experts)


def router(hidden: int, choices: int, tokens: int) -> Cost:
    return linear(hidden, choices, tokens, bias=False)


def capacity_predictor(hidden: int, choices: int, width: int, tokens: int) -> Cost:
    """DiffMoE's, with the thresholds and the scale of the gates."""
    return linear(hidden, width, tokens) + linear(width, choices, tokens) + parameters(choices + 1)


# Blocks


@dataclass(kw_only=True, slots=True, frozen=True)
class Conversion:
    """What was changed of a dense FLUX; `DENSE` is nothing. With a capacity router top_k is a token's mean number of
    experts: the router's capacity, where its thresholds are not scaled."""

    ffns: Mapping[str, FFNLayout]
    groups: Sequence[BlockGroup]
    adaln_rank: int | None
    top_k: float
    capacity_router: CapacityRouter | None = None

    @classmethod
    def of(
        cls,
        config: FluxMoEConfig,
        top_k: int | None = None,
        *,
        active_blocks: Sequence[int] | None = None,
        capacity: float = 1.0,
    ) -> Conversion:
        """That of a file as it says itself, or at another top_k, with so many active blocks of each group, or, of a file with
        a capacity router, at another capacity factor (see experts_at)."""
        if config.capacity_router is not None and top_k is None:
            mean = experts_at(capacity, config)
        else:
            mean = config.top_k if top_k is None else top_k
        active = [group.active for group in config.groups] if active_blocks is None else active_blocks
        return cls(
            ffns=config.ffns,
            groups=[dataclasses.replace(group, active=n) for group, n in zip(config.groups, active, strict=True)],
            adaln_rank=config.adaln_rank,
            top_k=mean,
            capacity_router=config.capacity_router,
        )


def experts_at(capacity: float, config: FluxMoEConfig) -> float:
    """A token's mean number of experts at a capacity factor: at 1 the router's own capacity, at 0 none.

    At other factors it is data, and this is an estimate: the factor multiplies the odds with which predictions pass their
    thresholds, here those of an expert to take a token.
    """
    assert config.capacity_router is not None
    experts = min((layout.experts for layout in config.ffns.values()), default=0)
    if capacity == 1 or not experts:
        return config.capacity_router.capacity
    share = config.capacity_router.capacity / experts
    return experts * capacity * share / (1 - share + capacity * share)


DENSE = Conversion(ffns={}, groups=(), adaln_rank=None, top_k=0)


def double_block(dims: FluxDims, index: int, conversion: Conversion, tokens: Tokens) -> Cost:
    hidden = dims.hidden_size
    cost = attention(hidden, tokens)
    for block_ffn in Block("double", index).ffns:
        stream, length = block_ffn.stream, tokens.image if block_ffn.stream == "img" else tokens.text
        layout = conversion.ffns.get(block_ffn.name)
        mlp = ffn(hidden, layout, conversion.top_k, length, conversion.capacity_router)
        cost += (
            modulation(hidden, 6, conversion.adaln_rank)
            + linear(hidden, 3 * hidden, length)
            + parameters(2 * HEAD)
            + linear(hidden, hidden, length)
            + (mlp.not_in_paper() if stream == "txt" and layout is not None else mlp)
        )
    return cost


def single_block(dims: FluxDims, index: int, conversion: Conversion, tokens: Tokens) -> Cost:
    """linear1 and linear2 taken apart; their FFN halves cost what an FFN costs, whose b2 is linear2's bias."""
    hidden, length = dims.hidden_size, tokens.joint
    return (
        attention(hidden, tokens)
        + modulation(hidden, 3, conversion.adaln_rank)
        + linear(hidden, 3 * hidden, length)
        + parameters(2 * HEAD)
        + linear(hidden, hidden, length, bias=False)
        + ffn(
            hidden,
            conversion.ffns.get(Block("single", index).name),
            conversion.top_k,
            length,
            conversion.capacity_router,
        )
    )


def group_routers(hidden: int, group: BlockGroup) -> Cost:
    """W_x and W_y (Eq. 5), on one vector each."""
    return router(hidden, group.blocks, 1) + router(hidden, group.blocks, 1)


# Model


def flux(dims: FluxDims, conversion: Conversion, tokens: Tokens) -> Cost:
    """One forward pass. Of a block group's m blocks, active / m run: each of them, where they differ, equally often."""
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
        cost += cost_of_kind(dims, block.index, conversion, tokens).activated(fractions.get(block, 1))
    return cost

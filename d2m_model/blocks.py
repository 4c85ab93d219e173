"""The blocks of FLUX.1 and their FFNs: kinds, order, and names in BFL's style (files, ComfyUI) and in diffusers'."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

BlockKind = Literal["double", "single"]
Stream = Literal["img", "txt", "joint"]  # the tokens that an FFN sees: a single block's are text and image in one

BLOCK_KINDS: tuple[BlockKind, ...] = ("double", "single")  # in the order in which they run

# A model's attribute that lists the blocks of a kind; tensor names begin with it.
BFL_BLOCKS: dict[BlockKind, str] = {"double": "double_blocks", "single": "single_blocks"}
DIFFUSERS_BLOCKS: dict[BlockKind, str] = {"double": "transformer_blocks", "single": "single_transformer_blocks"}

_KINDS = {attribute: kind for style in (BFL_BLOCKS, DIFFUSERS_BLOCKS) for kind, attribute in style.items()}
_BLOCK_NAME = re.compile(rf"({'|'.join(_KINDS)})\.([0-9]{{1,6}})(?=\.|$)")


@dataclass(slots=True, frozen=True, order=True)
class Block:
    """A block: its kind and its number among the blocks of that kind. Sorts in the order in which blocks run."""

    kind: BlockKind
    index: int

    @property
    def name(self) -> str:
        """`double_blocks.3`, `single_blocks.12`."""
        return f"{BFL_BLOCKS[self.kind]}.{self.index}"

    @property
    def diffusers_name(self) -> str:
        """`transformer_blocks.3`, `single_transformer_blocks.12`."""
        return f"{DIFFUSERS_BLOCKS[self.kind]}.{self.index}"

    @property
    def ffns(self) -> tuple[FFN, ...]:
        """The block's FFNs in the order in which they run."""
        return (FFN(self, "img"), FFN(self, "txt")) if self.kind == "double" else (FFN(self, "joint"),)

    @classmethod
    def parse(cls, name: str) -> Block | None:
        """Return the block that a name in either style belongs to: a block's, FFN's, module's or tensor's. None if none."""
        match = _BLOCK_NAME.match(name)
        return None if match is None else cls(_KINDS[match[1]], int(match[2]))


@dataclass(slots=True, frozen=True, order=True)
class FFN:
    """The FFN of one stream of a block. Sorts in the order in which FFNs run."""

    block: Block
    stream: Stream

    @property
    def name(self) -> str:
        """`double_blocks.3.img_mlp`, `double_blocks.3.txt_mlp` or, for the FFN of a single block, `single_blocks.12`."""
        return self.block.name if self.stream == "joint" else f"{self.block.name}.{self.stream}_mlp"

    @property
    def linears(self) -> tuple[str, str]:
        """BFL names of the up- and down-projection. A single block's hold the attention's projections too."""
        up, down = ("linear1", "linear2") if self.stream == "joint" else ("0", "2")
        return f"{self.name}.{up}", f"{self.name}.{down}"

    @property
    def diffusers_name(self) -> str:
        """The module of a double block's FFN, `transformer_blocks.3.ff` or `.ff_context`; a single block itself."""
        block = self.block.diffusers_name
        return {"img": f"{block}.ff", "txt": f"{block}.ff_context", "joint": block}[self.stream]

    @property
    def diffusers_linears(self) -> tuple[str, str]:
        """diffusers' names of the up- and down-projection. A single block's `proj_out` holds the attention's too."""
        up, down = ("proj_mlp", "proj_out") if self.stream == "joint" else ("net.0.proj", "net.2")
        return f"{self.diffusers_name}.{up}", f"{self.diffusers_name}.{down}"

    @classmethod
    def parse(cls, name: str) -> FFN:
        """Return the FFN with this BFL name. Raises ValueError for any other name."""
        block = Block.parse(name)
        for ffn in () if block is None else block.ffns:
            if ffn.name == name:
                return ffn
        raise ValueError(
            f"{name!r} is not an FFN's name; expected double_blocks.i.img_mlp, double_blocks.i.txt_mlp or single_blocks.i."
        )


def blocks_of(model: nn.Module) -> dict[Block, nn.Module]:
    """Every block of a FLUX.1 of ComfyUI or of diffusers, in the order in which they run."""
    style = BFL_BLOCKS if hasattr(model, BFL_BLOCKS["double"]) else DIFFUSERS_BLOCKS
    return {Block(kind, i): block for kind in BLOCK_KINDS for i, block in enumerate(getattr(model, style[kind]))}


def is_modulation(module: str) -> bool:
    """Test a module's BFL name for a block's modulation: `….img_mod.lin`, `….txt_mod.lin` or `….modulation.lin`."""
    return module.endswith(("_mod.lin", ".modulation.lin"))

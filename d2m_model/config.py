"""Configuration of a FLUX-MoE: dimensions, layout of every converted FFN, block groups; and the presets.

`FluxMoEConfig` is the content of the file's `d2m_config` tensor (see checkpoint.py). `from_json` checks all of it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .blocks import BLOCK_KINDS, FFN, Block, BlockKind
from .fields import ConfigError, expect, fields_of
from .foreign import read_json
from .routers import TOP_K_ROUTER, Gate, GateMode, TokenRouter, router_from_entries, router_to_entries
from .sensitivity import Sensitivity, read_sensitivity

SCHEMA_VERSION = 1
PATCH_LATENTS = 2  # latents on the side of an image token
PATCH_PIXELS = 8 * PATCH_LATENTS  # pixels on that side: the autoencoder makes one latent of 8 x 8 pixels
MAX_DEPTH = 1000  # blocks of each kind; FLUX.1 has 19 and 38
MLP_RATIO = 4  # FLUX.1's; every FFN has 4 * hidden_size neurons

PresetName = Literal["L", "M", "S", "XS"]
Selection = Literal["topk", "window"]


@dataclass(kw_only=True, slots=True, frozen=True)
class FluxDims:
    """Sizes of a FLUX.1 transformer. All follow from the shapes of its weights (checkpoint.dims_of)."""

    hidden_size: int
    double_blocks: int
    single_blocks: int
    in_channels: int  # of a token: 2 * 2 * latent channels (64 for FLUX.1 dev)
    out_channels: int
    context_size: int  # width of the text tokens (4096, T5)
    vector_size: int  # width of the pooled text (768, CLIP)
    guidance_embed: bool

    @property
    def neurons(self) -> int:
        return MLP_RATIO * self.hidden_size

    @property
    def depths(self) -> dict[BlockKind, int]:
        """The number of blocks of each kind."""
        return {"double": self.double_blocks, "single": self.single_blocks}

    @property
    def blocks(self) -> list[Block]:
        """Every block, in the order in which they run."""
        return [Block(kind, index) for kind, depth in self.depths.items() for index in range(depth)]

    @property
    def ffns(self) -> list[FFN]:
        """Every FFN, in the order in which they run."""
        return [ffn for block in self.blocks for ffn in block.ffns]

    def with_depths(self, *, double: int, single: int) -> FluxDims:
        """The same sizes with other numbers of blocks."""
        return dataclasses.replace(self, double_blocks=double, single_blocks=single)


@dataclass(kw_only=True, slots=True, frozen=True)
class FFNLayout:
    """Division of an FFN's neurons: `shared` for the shared expert, then `width` for each of the `experts`."""

    shared: int
    experts: int
    width: int

    @property
    def neurons(self) -> int:
        return self.shared + self.experts * self.width


@dataclass(kw_only=True, slots=True, frozen=True)
class BlockGroup:
    """A Mixture of Blocks (Eq. 4-5): consecutive blocks of one kind, of which `active` run."""

    kind: BlockKind
    first: int
    blocks: int
    active: int
    selection: Selection

    @property
    def indices(self) -> range:
        """The blocks' numbers among the blocks of their kind."""
        return range(self.first, self.first + self.blocks)

    @property
    def members(self) -> list[Block]:
        """The blocks in the order in which they run."""
        return [Block(self.kind, index) for index in self.indices]


@dataclass(kw_only=True, slots=True, frozen=True)
class Teacher:
    """Origin of the dense weights.

    `sha256` is the hash of the file, or of the index and shards in order. For a model that was in memory, such as one with
    LoRAs in its weights, it is the hash of its tensors (conversion.digest.TensorDigest).
    """

    title: str
    sha256: str
    licence: str


@dataclass(kw_only=True, slots=True, frozen=True)
class FluxMoEConfig:
    """Everything that a host must know beyond the tensors. `top_k` is the file's own k; hosts may run another."""

    dims: FluxDims
    ffns: dict[str, FFNLayout]  # by blocks.FFN.name
    groups: tuple[BlockGroup, ...]
    gate: Gate
    top_k: int
    adaln_rank: int | None  # None: modulations are dense FLUX's
    split_only: bool  # weights are the teacher's, permuted, and un-conversion is bit-exact
    teacher: Teacher
    router: TokenRouter = TOP_K_ROUTER
    stand_in_rank: int | None = None  # of the blocks of groups (stand_ins.py); None: skipped blocks have none
    provenance: dict[str, Any] = field(default_factory=dict)  # how it was made: tool version, importance, data, seed
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version > SCHEMA_VERSION:
            raise ConfigError(
                f"This file is FLUX-MoE schema {self.schema_version}; this version reads up to {SCHEMA_VERSION}. "
                "Update ComfyUI-Dense2MoE."
            )
        expect(self.schema_version >= 1, "schema_version", self.schema_version, "1 or more")
        expect(self.gate.mode in get_args(GateMode), "gate.mode", self.gate.mode, "'sum' or 'normalised'")
        expect(0 < self.gate.scale < float("inf"), "gate.scale", self.gate.scale, "a positive number")
        for size, value in dataclasses.asdict(self.dims).items():
            expect(size == "guidance_embed" or value >= 1, f"dims.{size}", value, "1 or more")
        for kind, depth in self.dims.depths.items():  # before anything is as long as this
            expect(depth <= MAX_DEPTH, f"dims.{kind}_blocks", depth, f"{MAX_DEPTH} at most")
        expect(self.adaln_rank is None or self.adaln_rank >= 1, "adaln_rank", self.adaln_rank, "1 or more, or null")
        rank = self.stand_in_rank
        expect(
            rank is None or (rank >= 1 and bool(self.groups)), "stand_in_rank", rank, "null, or with groups 1 or more"
        )
        baked, outputs = self.provenance.get("baked", []), self.provenance.get("teacher_outputs", {})
        expect(isinstance(baked, list), "provenance.baked", baked, "a list")
        for kind, depth in self.dims.depths.items():
            rising = _rising_numbers(outputs.get(kind, list(range(depth)))) if isinstance(outputs, dict) else []
            expect(len(rising) == depth, "provenance.teacher_outputs", outputs, "rising numbers of blocks by kind")
        names = set(all_ffn_names(self.dims))
        for name, layout in self.ffns.items():
            expect(
                name in names,
                "ffns",
                name,
                f"an FFN of {self.dims.double_blocks} double and {self.dims.single_blocks} single blocks",
            )
            expect(
                layout.shared >= 0
                and layout.experts >= 1
                and layout.width >= 1
                and layout.neurons == self.dims.neurons,
                f"ffns[{name!r}]",
                f"{layout.shared} + {layout.experts} x {layout.width} neurons",
                f"shared + experts x width = {self.dims.neurons}",
            )
        fewest = self.fewest_experts
        expect(0 <= self.top_k <= fewest or not self.ffns, "top_k", self.top_k, f"0 to {fewest}")
        self.router.check(fewest)
        taken: set[Block] = set()
        for index, group in enumerate(self.groups):
            depth = self.dims.depths[group.kind] if group.kind in BLOCK_KINDS else 0
            fits = (
                group.kind in BLOCK_KINDS
                and group.first >= 0
                and group.blocks >= 2
                and group.first + group.blocks <= depth
            )
            expect(fits, f"groups[{index}]", group, f"two or more blocks within the {depth} {group.kind} blocks")
            expect(
                group.selection in get_args(Selection),
                f"groups[{index}].selection",
                group.selection,
                "'topk' or 'window'",
            )
            expect(0 <= group.active <= group.blocks, f"groups[{index}].active", group.active, f"0 to {group.blocks}")
            expect(taken.isdisjoint(group.members), f"groups[{index}]", group, "blocks that no other group has")
            taken.update(group.members)
        measurable = self.sensitivity is None or self.router.setting == TOP_K_ROUTER.setting
        expect(measurable, "provenance.sensitivity", "a table", f"none in a file that has {self.router.named}")

    @property
    def fewest_experts(self) -> int:
        """Experts of the FFN that has the fewest; 0 if no FFN is routed."""
        return min((layout.experts for layout in self.ffns.values()), default=0)

    @property
    def sensitivity(self) -> Sensitivity | None:
        """The table in the provenance by which a compute budget is spent; None if it has not been measured."""
        experts = {name: layout.experts for name, layout in self.ffns.items()}
        return read_sensitivity(self.provenance, experts, [group.blocks for group in self.groups])

    @property
    def router_value(self) -> float:
        """Value of the router's setting at which the file runs by itself. At 0 no expert runs."""
        return self.router.own_value(self.top_k)

    def to_json(self) -> str:
        entries = dataclasses.asdict(self)
        del entries["router"]
        if self.stand_in_rank is None:  # as in files of versions before stand-ins, which these versions still read
            del entries["stand_in_rank"]
        return json.dumps(entries | router_to_entries(self.router), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> FluxMoEConfig:
        """Parse and check. Raises ConfigError with the field's name for anything missing, unknown or out of range.

        A newer schema is reported before its fields are checked.
        """
        try:
            data = read_json(text)
        except ValueError as error:
            raise ConfigError(
                f"d2m_config is not JSON ({error}); the file is damaged. Convert the teacher again."
            ) from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ConfigError(
                f"This file is FLUX-MoE schema {version}; this version reads up to {SCHEMA_VERSION}. Update ComfyUI-Dense2MoE."
            )
        expect(isinstance(data, dict), "d2m_config", data, "an object")
        router = router_from_entries(data)
        data = fields_of(cls, {"stand_in_rank": None} | data, "d2m_config", without=("router",))
        data["dims"] = FluxDims(**fields_of(FluxDims, data["dims"], "dims"))
        expect(isinstance(data["ffns"], dict), "ffns", data["ffns"], "an object")
        data["ffns"] = {
            name: FFNLayout(**fields_of(FFNLayout, value, f"ffns[{name!r}]")) for name, value in data["ffns"].items()
        }
        expect(isinstance(data["groups"], list), "groups", data["groups"], "a list")
        data["groups"] = tuple(
            BlockGroup(**fields_of(BlockGroup, value, f"groups[{index}]")) for index, value in enumerate(data["groups"])
        )
        data["gate"] = Gate(**fields_of(Gate, data["gate"], "gate"))
        data["teacher"] = Teacher(**fields_of(Teacher, data["teacher"], "teacher"))
        return cls(router=router, **data)


def _rising_numbers(value: object) -> list[int]:
    """Return a list of rising whole numbers as it is, and an empty list for anything else."""
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        return []
    return value if value == sorted(set(value)) else []


def all_ffn_names(dims: FluxDims) -> list[str]:
    """Every FFN of a dense FLUX, in the order in which they run."""
    return [ffn.name for ffn in dims.ffns]


def adaln_rank_of(hidden_size: int) -> int:
    """Return the rank of the AdaLN compression (Sec. 4.1): 256 at hidden size 3072."""
    return round(hidden_size / 12)


def paper_layout(hidden_size: int) -> FFNLayout:
    """Return the paper's layout (Sec. 4.1): r_s = 1, n = 12, r_n = 0.25."""
    if hidden_size % 4:
        raise ConfigError(f"hidden_size is {hidden_size}; expected a multiple of 4.")
    return FFNLayout(shared=hidden_size, experts=12, width=hidden_size // 4)


def preset_layouts(dims: FluxDims) -> dict[str, FFNLayout]:
    """Return the paper's MoE layers: all FFNs except those of the first round(3 D / 19) double blocks (at least one)."""
    layout = paper_layout(dims.hidden_size)
    first = Block("double", dense_doubles(dims))
    return {ffn.name: layout for ffn in dims.ffns if ffn.block >= first}


def preset_groups(name: PresetName, dims: FluxDims) -> tuple[BlockGroup, ...]:
    """Return a preset's block groups: M has groups of three double blocks, S and XS also groups of five single blocks.

    On FLUX.1 (19 + 38 blocks) M has five double groups, S three and XS five single groups. Groups take the last double
    blocks, and single blocks that are spread evenly.
    """
    if name == "L":
        return ()
    dense = dense_doubles(dims)
    room = (dims.double_blocks - dense) // 3
    if room < 1:
        raise ConfigError(f"Preset {name} needs {dense + 3} double blocks or more; this FLUX has {dims.double_blocks}.")
    doubles = max(1, min(round(5 * dims.double_blocks / 19), room))
    first = dims.double_blocks - 3 * doubles
    groups = [
        BlockGroup(kind="double", first=first + 3 * g, blocks=3, active=1, selection="topk") for g in range(doubles)
    ]
    if name in ("S", "XS"):
        most = dims.single_blocks // 5
        if most < 1:
            raise ConfigError(f"Preset {name} needs 5 single blocks or more; this FLUX has {dims.single_blocks}.")
        singles = max(1, min(round((3 if name == "S" else 5) * dims.single_blocks / 38), most))
        spare = dims.single_blocks - 5 * singles
        for g in range(singles):
            groups.append(
                BlockGroup(
                    kind="single",
                    first=5 * g + round(spare * (g + 1) / (singles + 1)),
                    blocks=5,
                    active=1,
                    selection="topk",
                )
            )
    return tuple(groups)


def dense_doubles(dims: FluxDims) -> int:
    """Return how many of the first double blocks the presets leave dense and outside of groups."""
    return max(1, round(3 * dims.double_blocks / 19))

"""Configuration of a run: the fields of its YAML file and their defaults. The resolved file is saved with the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from d2m_model.config import PresetName, Selection
from d2m_model.conversion.block_routers import BlockRouterInit
from d2m_model.conversion.ffn import Experts
from d2m_model.conversion.options import OPTIONS, Baseline, FFNKind, Importance
from d2m_model.conversion.router_init import RouterInit
from d2m_model.routers import KINDS

from .text_file import expand_home

Stage = Literal["convert", "shared", "experts", "blocks", "export"]
STAGES: tuple[Stage, ...] = get_args(Stage)

Count = Annotated[int, Field(ge=1)]
_Resolution = Annotated[int, Field(ge=16, multiple_of=16)]
_Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
FilePath = Annotated[Path, AfterValidator(expand_home)]
Dtype = Literal["float32", "bfloat16", "float16"]
_Item = TypeVar("_Item")


def _listed(value: Any) -> Any:
    """Take one value for a list of it."""
    return value if value is None or isinstance(value, list | tuple) else (value,)


Several = Annotated[tuple[_Item, ...], BeforeValidator(_listed)]
KnownFlux = Literal["flux1-dev", "flux1-schnell", "flux1-lite", "flux1-mini", "emoji"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class Lora(Section):
    path: FilePath
    strength: float = 1.0


class TeacherSection(Section):
    path: FilePath
    dtype: Dtype = "bfloat16"
    quantise: Literal["fp8", "int8", "nf4"] | None = None
    """Quantisation of the blocks' linear layers while the teacher runs; the student is made from the file's weights."""
    offload: Literal["none", "cpu", "stream"] = "none"
    """Location of blocks while they do not run. `cpu`: the host's memory; `stream`: the file. Not together with quantise."""
    loras: Several[Lora] = ()
    """LoRAs that are fused into the teacher, so that the student learns to imitate both."""
    dims: KnownFlux | None = None
    """Dimensions of the teacher, for --dry-run on a machine without its file (Krea and Kontext have those of flux1-dev)."""

    @model_validator(mode="after")
    def _fits(self) -> TeacherSection:
        if self.offload == "stream" and self.quantise is not None:
            raise ValueError(f"offload stream reads the file's own weights; leave out quantise {self.quantise}")
        if self.offload == "cpu" and self.quantise is not None:
            raise ValueError(
                f"offload cpu moves weights as the file has them, and quantise is {self.quantise}; "
                "expected one of the two: leave out quantise, or give offload none"
            )
        return self


def _option(name: str) -> Any:
    """Return the field of a conversion's option, with its default and help."""
    option = OPTIONS[name]
    return Field(option.default, description=option.help)


def _known_router(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of router; expected {' or '.join(map(repr, KINDS))}")
    return kind


class StudentSection(Section):
    preset: PresetName = Field(description=OPTIONS["preset"].help)
    baseline: Baseline = _option("baseline")
    router: Annotated[str, AfterValidator(_known_router)] = _option("router_kind")
    predictor_width: Count = _option("predictor_width")
    top_k: Count = _option("top_k")
    ffns: FFNKind = _option("ffns")
    adaln_rank: Count | Literal["preset", "none"] = _option("adaln_rank")
    groups: Literal["preset", "auto"] | tuple[str, ...] = _option("groups")
    active: Count = _option("active")
    selection: Selection = _option("selection")
    dtype: Dtype = "float32"
    """Dtype of the trained weights; mixed precision is training.mixed_precision."""
    start: FilePath | None = None
    """A FLUX-MoE file to start from instead of a conversion, for example to distil a blockwise run's result end to end.
    Preset, groups and routers are then that file's."""
    frozen_dtype: Dtype | None = None
    """Dtype of the weights that a stage does not train (default: dtype); bfloat16 halves them, with mixed precision."""


class ConvertSection(Section):
    importance: Importance = _option("importance")
    experts: Experts = _option("experts")
    router: RouterInit = _option("router")
    block_router: BlockRouterInit = _option("block_router")
    stand_ins: bool = _option("stand_ins")
    mean: bool = _option("mean")
    refit: bool = _option("refit")
    batches: Count = _option("batches")
    batch_size: Count = _option("batch_size")
    tokens: Count = _option("tokens")
    device: Literal["cpu"] | None = None
    """Device on which the whole teacher is calibrated (default: a GPU if there is one). `cpu` takes 4 bytes per parameter."""


class DataSection(Section):
    source: Literal["emoji", "folder", "webdataset", "parquet", "prompts", "latents"]
    path: FilePath | None = None
    """A folder of images with .txt captions; shards; a parquet file; a file of prompts; precomputed latents."""
    image_column: str | None = None
    caption_column: str | None = None
    """Column of a parquet file, or field of a shard's .json; by default found by name and type."""
    resolutions: Annotated[Several[_Resolution], Field(min_length=1)] = (1024,)
    """Side in pixels of a square of the same area; each resolution has buckets of aspect ratios."""
    enlarge: Annotated[float, Field(ge=1)] = 1.25
    """Maximum factor by which images are enlarged; those too small for the smallest resolution are left out."""
    cache: FilePath | None = None
    """Folder for latents and text embeddings (default: output_dir/cache)."""
    text_encoders: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    """A local folder or hub name of a diffusers FLUX pipeline, a folder with the files clip_l… and t5xxl… as ComfyUI has
    them, or `emoji` for the demo's prompt encoder."""
    text_tokens: Count = 512
    """T5's sequence length; longer captions are cut."""
    vae: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    """The same pipeline or another, a folder with only the autoencoder, ae.safetensors, or `emoji`."""
    encoder_dtype: Dtype = "bfloat16"
    """Dtype of text encoders and autoencoder, and of the text embeddings in the cache."""
    held_out: Annotated[float, Field(ge=0, lt=1)] | FilePath = 0.02
    """Share of the samples that validation uses and training does not, chosen by content, or the path of other data."""
    pool: Count | None = None
    """Number of emoji pictures that are encoded once and reused, instead of new ones for every batch."""

    @model_validator(mode="after")
    def _complete(self) -> DataSection:
        if (self.source == "emoji") != (self.path is None):
            needs = "takes no path" if self.source == "emoji" else "needs a path"
            raise ValueError(f"source {self.source} {needs}")
        needs_encoders = self.source not in ("emoji", "latents")
        needs_vae = needs_encoders and self.source != "prompts"
        needed = ["text_encoders"] * needs_encoders + ["vae"] * needs_vae
        if missing := [field for field in needed if getattr(self, field) is None]:
            raise ValueError(f"source {self.source} needs {' and '.join(missing)}")
        if self.source == "emoji" and isinstance(self.held_out, Path):
            raise ValueError("source emoji takes no path for held_out; expected a share from 0 to 1")
        if self.pool is not None and self.source != "emoji":
            raise ValueError(f"pool is only for source emoji; source {self.source} keeps all its samples")
        return self


class TimestepsSection(Section):
    sampling: Literal["logit_normal", "teacher_grid"] = "logit_normal"
    """`teacher_grid`: noise levels at which the teacher samples, for few-step teachers."""
    mean: float = 0.0
    std: _Rate = 1.0
    shift: float | Literal["resolution"] = "resolution"
    """mu of FLUX's time shift exp(mu): 0 for schnell, 1.15 for ComfyUI's FLUX; `resolution`: dev's, by image tokens."""
    grid_steps: Count = 20


class LossesSection(Section):
    feature: Weight = 1.0
    balance: Weight = 0.01
    """Balance of the token routers, in stage experts."""
    block_balance: Weight = 0.01
    """Balance of the block routers, in stage blocks."""
    block_choice: Weight = 0.1
    """The block routers' task, in groups with one active block: to choose the block that alone comes nearest to the teacher."""
    idle_blocks: Weight = 0.1
    """Error of the blocks that were not chosen, in groups with one active block, so that they learn from every sample, too."""
    outliers: _Rate | None = None
    """Teacher features beyond this many standard deviations are left out."""
    text_padding: bool = False
    """Count padding text tokens in the balance loss."""


class StageSection(Section):
    steps: Annotated[int, Field(ge=0)] = 1000
    learning_rate: _Rate = 1e-4
    trainable: Several[str] | None = None
    """Patterns of the names of trainable parameters (fnmatch), instead of the stage's own."""


class StagesSection(Section):
    shared: StageSection = StageSection()
    experts: StageSection = StageSection()
    blocks: StageSection = StageSection()


class TrainingSection(Section):
    batch_size: Count = 1
    """Samples per device and pass; the global batch is this times accumulation times processes."""
    accumulation: Count = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    blockwise: bool = False
    """Train one block at a time against the teacher's features, which are stored on disk: a 12 B conversion on one
    consumer GPU. `steps` of a stage then count for each block. End-to-end distillation should follow."""
    blockwise_samples: Count = 512
    """Samples whose features are stored during the stage; every block is trained on them repeatedly."""
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    max_grad_norm: _Rate | None = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    compile: bool | str = False
    """torch.compile every block: `true` for inductor, which needs a C++ compiler, or another backend's name."""


class CheckpointsSection(Section):
    every: Count = 500
    keep: Count = 2


class EyesSection(Section):
    log_every: Count = 10
    routers_every: Count = 100
    """Steps between two measurements of load, entropy, balance and dead experts, each of which is of up to ten steps."""
    validate_every: Count = 250
    validation_batches: Count = 2
    """Held-out batches, each evaluated at all noise levels."""
    validation_timesteps: Count = 5
    sample_every: Count = 500
    samples: Annotated[int, Field(ge=0)] = 8
    """Images in a grid; from the source's own samples if there are no prompts."""
    prompts: Several[str] = ()
    sample_steps: Count = 20
    sample_guidance: Weight = 3.5
    wandb: bool = False


class ExportSection(Section):
    file: FilePath = Path("student.safetensors")
    """Path within output_dir, or an absolute path."""
    dtype: Dtype = "bfloat16"


class RunConfig(Section):
    output_dir: FilePath
    seed: int = 0
    resume: Literal["latest", "changed", "never"] = "never"
    """`latest`: continue the run in output_dir where it stopped, or start it. `changed`: do so with other steps or learning
    rates of its stages."""
    restart: Stage | None = None
    """Repeat this stage of the run in output_dir, and those after it."""
    stages: Several[Stage] = STAGES
    teacher: TeacherSection
    student: StudentSection
    data: DataSection
    convert: ConvertSection = ConvertSection()
    timesteps: TimestepsSection = TimestepsSection()
    guidance: tuple[float, float] = (1.5, 5.0)
    losses: LossesSection = LossesSection()
    stage: StagesSection = StagesSection()
    training: TrainingSection = TrainingSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    eyes: EyesSection = EyesSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _in_order(self) -> RunConfig:
        if self.restart is not None and self.restart not in self.stages:
            raise ValueError(f"restart is {self.restart}, which is not among the stages {', '.join(self.stages)}")
        if self.student.frozen_dtype not in (None, self.student.dtype) and self.training.mixed_precision == "no":
            raise ValueError(
                f"student.frozen_dtype {self.student.frozen_dtype} beside {self.student.dtype} needs "
                "training.mixed_precision (bf16)"
            )
        if list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            raise ValueError(
                f"stages are {', '.join(self.stages)}; expected each at most once, in the order {', '.join(STAGES)}"
            )
        return self

    def to_yaml(self) -> str:
        """Return all fields as YAML, so that a run does not depend on later defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

"""Conversion of a dense FLUX into a FLUX-MoE file in one pass, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..blocks import is_modulation
from ..checkpoint import CONFIG_KEY, config_tensor, expected_tensors, optional_tensors
from ..config import FluxMoEConfig, Teacher
from ..layout import ffn_tensors
from ..routers.token_router import BIAS
from ..teacher import DenseTeacher
from ..tensor_file import CheckpointError, Shape
from ..tensor_writer import TensorWriter
from .digest import Digest, PacedDigest, TensorDigest
from .interfaces import FFNPlan, FFNWeights, Modulations, PlanFFN, TeacherTensors
from .permute import permuted_pieces

UNKNOWN_LICENCE = "not stated in the teacher's file"
ARCHITECTURE = "modelspec.architecture"
UNHASHED = "0" * 64  # as long as a sha256: the header's length is fixed before the hash is known

ByteProgress = Callable[[int], object]  # called with the number of bytes done since its last call


def describe_teacher(teacher: DenseTeacher) -> Teacher:
    """Return title (by default the file's name) and licence of a teacher. Its sha256 is known after the conversion."""
    path = teacher.path.absolute()
    if path.name.startswith(
        "diffusion_pytorch_model"
    ):  # the file name of every diffusers model; the folder's name says more
        path = path.parent
    if path.name == "transformer":
        path = path.parent
    return Teacher(
        title=teacher.metadata.get("modelspec.title") or (path.name if path.is_dir() else path.stem),
        sha256=UNHASHED,
        licence=teacher.metadata.get("modelspec.license") or UNKNOWN_LICENCE,
    )


def refuse_same_file(
    sources: Iterable[str | os.PathLike[str]], target: str | os.PathLike[str], what: str = "this is the teacher"
) -> None:
    """Raises CheckpointError if the output would replace one of the source files, under any name."""
    for source in sources:
        if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
            raise CheckpointError(f"{target}: {what}; write to another file.")


def convert_file(
    teacher: TeacherTensors,
    target: str | os.PathLike[str],
    config: FluxMoEConfig,
    plan: PlanFFN,
    *,
    modulations: Modulations | None = None,
    router_bias: bool = False,
    expert_mean: bool = False,
    block_groups: Mapping[str, Tensor] | None = None,
    progress: ByteProgress = lambda done: None,
) -> FluxMoEConfig:
    """Write the FLUX-MoE that `config` describes. Return its configuration with the teacher's sha256.

    The teacher is read once, tensor by tensor. Its weights keep their dtype; new tensors are float32.
    plan                      called once for each FFN of `config.ffns`, when its weights are read
    modulations               needed if `config.adaln_rank` is set
    router_bias, expert_mean  the optional tensors that every plan has
    block_groups              the tensors of `config.groups` by name, float32: routers and stand-ins
    progress                  gets `teacher.size` bytes in total
    Raises CheckpointError if the file cannot be written or would replace the teacher.
    """
    refuse_same_file(teacher.files, target)
    if (config.adaln_rank is None) != (modulations is None):
        raise ValueError(f"adaln_rank is {config.adaln_rank}; expected it with `modulations`, and only with them.")
    if config.split_only and modulations is not None:
        raise ValueError("split_only is true; expected false with compressed modulations.")
    config = replace(config, teacher=replace(config.teacher, sha256=UNHASHED))
    tensors = _announce(teacher, config, router_bias=router_bias, expert_mean=expert_mean)
    metadata = file_metadata(config, teacher.metadata)
    hashing = PacedDigest(teacher.files) if teacher.files else TensorDigest()
    with hashing as digest, TensorWriter(target, tensors, metadata) as writer:
        for name, tensor in (block_groups or {}).items():
            writer.put(name, tensor.float())
        if modulations is not None:
            writer.put("adaln_in.weight", modulations.adaln_in_AH.float())
        conversion = _Conversion(teacher, config, plan, modulations, writer, digest, progress)
        conversion.run(router_bias=router_bias, expert_mean=expert_mean)
        config = replace(config, teacher=replace(config.teacher, sha256=digest.result()))
        writer.put(CONFIG_KEY, config_tensor(config))
        writer.finish(file_metadata(config, teacher.metadata))
    return config


def _announce(
    teacher: TeacherTensors, config: FluxMoEConfig, *, router_bias: bool, expert_mean: bool
) -> dict[str, tuple[torch.dtype, Shape]]:
    """Return dtype and shape of every tensor of the file, the teacher's first: writing then follows the reading order."""
    shapes = expected_tensors(config)
    for name, shape in optional_tensors(config).items():
        if (router_bias and name.endswith(".router.bias")) or (expert_mean and name.endswith(".expert_mean")):
            shapes[name] = shape
    tensors = {name: (teacher.dtypes[name], shapes[name]) for name in teacher.shapes}
    for name, shape in shapes.items():
        if name not in tensors:
            tensors[name] = (torch.int32 if name.endswith(".neuron_order") else torch.float32, shape)
    carried = config_tensor(config)
    return tensors | {CONFIG_KEY: (carried.dtype, tuple(carried.shape))}


class _Conversion:
    """The one pass over the teacher's tensors."""

    def __init__(
        self,
        teacher: TeacherTensors,
        config: FluxMoEConfig,
        plan: PlanFFN,
        modulations: Modulations | None,
        writer: TensorWriter,
        digest: Digest,
        progress: ByteProgress,
    ) -> None:
        self.teacher, self.config, self.plan, self.modulations = teacher, config, plan, modulations
        self.writer, self.digest, self.progress = writer, digest, progress
        self._reported = 0  # bytes that `progress` got

    def run(self, *, router_bias: bool, expert_mean: bool) -> None:
        hidden_size = self.config.dims.hidden_size
        ffn_of: dict[str, str] = {}  # by the tensors that hold an FFN's neurons or its b2
        for ffn in self.config.ffns:
            stored = ffn_tensors(ffn, hidden_size)
            for name in (f"{stored.up}.weight", f"{stored.up}.bias", f"{stored.down}.weight", f"{stored.down}.bias"):
                ffn_of[name] = ffn
        written: set[str] = set()
        for name in self.teacher.shapes:
            if name not in ffn_of:
                self._tensor(name)
            elif name.endswith(".weight") and (ffn := ffn_of[name]) not in written:
                # Biases may be elsewhere in the file, for example before all weights; they are small, so read them now.
                self._ffn(ffn, router_bias=router_bias, expert_mean=expert_mean)
                written.add(ffn)
        self.progress(self.teacher.size - self._reported)

    def _read(self, name: str) -> Tensor:
        end = self.teacher.span(name)[1]
        self.digest.reach(end)
        if end > self._reported:
            self.progress(end - self._reported)
            self._reported = end
        tensor = self.teacher.tensor(name)
        self.digest.take(name, tensor)
        return tensor

    def _tensor(self, name: str) -> None:
        module, _, kind = name.rpartition(".")
        if self.modulations is None or not is_modulation(module):
            self.writer.put(name, self._read(name))
        elif kind == "weight":
            bias = f"{module}.bias"
            weight_OA, bias_O = self.modulations.compress(module, self._read(name), self._read(bias))
            self.writer.put(name, weight_OA.to(self.teacher.dtypes[name]))
            self.writer.put(bias, bias_O.to(self.teacher.dtypes[bias]))
        self.teacher.release(name)

    def _ffn(self, ffn: str, *, router_bias: bool, expert_mean: bool) -> None:
        dims = self.config.dims
        stored = ffn_tensors(ffn, dims.hidden_size)
        up, down = self._read(f"{stored.up}.weight"), self._read(f"{stored.down}.weight")
        up_bias, down_bias = self._read(f"{stored.up}.bias"), self._read(f"{stored.down}.bias")
        rows, columns = (stored.first_row, dims.neurons), (stored.first_column, dims.neurons)
        weights = FFNWeights(
            up_NH=up.narrow(0, *rows),
            up_bias_N=up_bias.narrow(0, *rows),
            down_HN=down.narrow(1, *columns),
            down_bias_H=down_bias,
        )
        plan = self.plan(ffn, weights)
        self._check(ffn, plan, router_bias=router_bias, expert_mean=expert_mean)
        put, order = self.writer.put_pieces, plan.order_N
        self.writer.put(f"{ffn}.neuron_order", order)
        for name, tensor in plan.router.items():
            self.writer.put(f"{ffn}.{name}", tensor.float())
        if plan.expert_mean_EH is not None:
            self.writer.put(f"{ffn}.expert_mean", plan.expert_mean_EH)
        put(f"{stored.up}.weight", permuted_pieces(up, 0, stored.first_row, order))
        put(f"{stored.up}.bias", permuted_pieces(up_bias, 0, stored.first_row, order))
        pieces = permuted_pieces(down, 1, stored.first_column, order)
        if plan.shared_down_HS is not None:
            pieces = _with_columns(pieces, stored.first_column, plan.shared_down_HS)
        put(f"{stored.down}.weight", pieces)
        refit = plan.down_bias_H
        self.writer.put(f"{stored.down}.bias", down_bias if refit is None else refit.to(down_bias.dtype))
        for module in (stored.up, stored.down):
            self.teacher.release(f"{module}.weight")

    def _check(self, ffn: str, plan: FFNPlan, *, router_bias: bool, expert_mean: bool) -> None:
        """Raises ValueError for a plan that does not match the announced tensors."""
        announced = [*self.config.router.shapes(0, 0), *([BIAS] if router_bias else ())]
        if sorted(plan.router) != sorted(announced):
            raise ValueError(f"{ffn}: router has {', '.join(plan.router)}; announced {', '.join(announced)}.")
        if (plan.expert_mean_EH is not None) != expert_mean:
            given = "missing" if plan.expert_mean_EH is None else "given"
            raise ValueError(f"{ffn}: expert_mean_EH is {given}; announced otherwise.")
        if self.config.split_only and (plan.shared_down_HS is not None or plan.down_bias_H is not None):
            raise ValueError(f"{ffn}: refit; expected the teacher's weights, since split_only is true.")


def _with_columns(pieces: Iterable[Tensor], first: int, columns_HS: Tensor) -> Iterator[Tensor]:
    """Yield consecutive parts of a weight [H, N] whose columns from `first` on are replaced by `columns_HS`."""
    row = 0
    for piece in pieces:
        piece[:, first : first + columns_HS.shape[1]] = columns_HS[row : row + len(piece)]
        yield piece
        row += len(piece)


def file_metadata(config: FluxMoEConfig, teacher: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the header's metadata, for people and model managers: the configuration and modelspec fields."""
    architecture = "Flux.1-dev" if config.dims.guidance_embed else "Flux.1-schnell"
    dense = (
        "Its weights are the teacher's with reordered FFN neurons: without the pack it opens and samples as the dense teacher."
        if config.split_only
        else "It needs the pack: opened as a dense FLUX it would run, and give wrong images."
    )
    return {
        CONFIG_KEY: config.to_json(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": f"{config.teacher.title} FLUX-MoE",
        ARCHITECTURE: (teacher or {}).get(ARCHITECTURE) or architecture,
        "modelspec.license": config.teacher.licence,
        "modelspec.description": (
            f"FLUX-MoE (schema {config.schema_version}) for ComfyUI-Dense2MoE, converted from {config.teacher.title}. {dense}"
        ),
    }

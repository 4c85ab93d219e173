"""Settings of a conversion by the trainer, and the configuration of the file that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2m_model.config import FluxDims, FluxMoEConfig, Teacher
from d2m_model.conversion import method
from d2m_model.conversion.method import Method, MethodError
from d2m_model.conversion.options import method_arguments

from .. import UserError

if TYPE_CHECKING:
    from ..run_config import RunConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class ConversionSettings(Method):
    """Settings of a conversion: a method, its teacher, and its calibration.

    teacher       path that open_teacher reads
    out           the FLUX-MoE file to write
    batches, batch_size   of the calibration
    tokens        inputs kept of every FFN, over the whole calibration
    device        of calibration and fits; None: cuda if there is one, else cpu
    folder        keeps the calibration, which can be continued; None: beside `out` until that is written
    report_file   the JSON report; None: beside `out`
    """

    teacher: Path
    out: Path
    batches: int
    batch_size: int
    tokens: int
    device: str | None = None
    folder: Path | None = None
    report_file: Path | None = None

    @property
    def calibration_folder(self) -> Path:
        return self.folder or self.out.with_name(f"{self.out.name}.calibration")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def resolved(self) -> ConversionSettings:
        """Adapt the recipe to baseline and router. Raises UserError for options that exclude each other."""
        with as_user_error():
            return method.resolved(self)

    def check_data(self) -> None:
        """Raise UserError if an option needs calibration data."""
        if self.needs:
            raise UserError(f"This conversion has to run the teacher ({', '.join(self.needs)}): give data.")


@contextmanager
def as_user_error() -> Iterator[None]:
    try:
        yield
    except MethodError as error:
        raise UserError(str(error)) from None


def settings_from_run(run: RunConfig, teacher_path: Path, out: Path, folder: Path | None) -> ConversionSettings:
    """Settings of a run's stage `convert`: from the teacher at `teacher_path` to the file `out`, calibrated in `folder`.

    The teacher's LoRAs, if it has any, are fused in that file already.
    """
    convert, student = run.convert, run.student
    values = convert.model_dump() | student.model_dump()
    values |= {"router": convert.router, "router_kind": student.router, "seed": run.seed}
    return ConversionSettings(
        teacher=teacher_path,
        out=out,
        batches=convert.batches,
        batch_size=convert.batch_size,
        tokens=convert.tokens,
        device=convert.device,
        folder=folder,
        **method_arguments(values),
    )


def file_config(settings: ConversionSettings, dims: FluxDims, teacher: Teacher, data_name: str | None) -> FluxMoEConfig:
    """Return the file's configuration, without the teacher's hash, for resolved settings. Raises UserError or ConfigError.

    With groups `auto` and depth pruning the blocks are the preset's, until calibration decides on them.
    """
    top_k, rank = settings.recipe.top_k, settings.rank(dims)
    if not 1 <= top_k <= (most := settings.most_experts(dims)):
        raise UserError(f"--top-k is {top_k}; expected 1 to {most}, the number of experts.")
    if rank is not None and rank > dims.hidden_size:
        raise UserError(f"--adaln-rank is {rank}; expected 1 to {dims.hidden_size}, the hidden size.")
    data: dict[str, object] | None = None
    if data_name is not None:
        data = {"name": data_name, "batches": settings.batches, "batch_size": settings.batch_size}
    with as_user_error():
        return method.new_config(settings, dims, teacher, data)

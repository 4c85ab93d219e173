"""A FLUX-MoE file with its sensitivity table: measured against the teacher, and written beside or over the file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from d2m_model.checkpoint import CONFIG_KEY, check_opened, config_tensor
from d2m_model.conversion.convert import file_metadata
from d2m_model.sensitivity import SENSITIVITY, Sensitivity
from d2m_model.tensor_file import TensorFile
from d2m_model.tensor_writer import TensorWriter

from ..data.batch import DataSource
from ..progress import progress_bar
from .sensitivity import SensitivitySettings, measure_sensitivity


def add_table(
    source: Path,
    target: Path,
    teacher: Path,
    data: DataSource,
    settings: SensitivitySettings,
    device: torch.device,
) -> Sensitivity:
    """Write the FLUX-MoE `source` with its table to `target`, which may be the same file, and return the table.

    Raises UserError for data or a file that cannot be measured, CheckpointError for files that cannot be read or written.
    """
    from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    student = FluxMoETransformer2DModel.from_flux_moe(source, dtype).requires_grad_(False)
    dense = load_transformer(teacher, dtype, device).requires_grad_(False)
    with progress_bar(total=settings.bins * settings.batches, desc="Sensitivity", unit="batch") as bar:
        table = measure_sensitivity(dense, student, data, settings, bar.update)
    write_table(source, target, table)
    return table


def write_table(source: Path, target: Path, table: Sensitivity) -> None:
    """Write the FLUX-MoE `source` with this table, tensor by tensor and atomically. Its other content stays."""
    with TensorFile(source) as file:
        config = check_opened(file)
        config = replace(config, provenance=config.provenance | {SENSITIVITY: table.entry()})
        stored = config_tensor(config)
        specs = {name: (file.dtypes[name], shape) for name, shape in file.shapes.items()}
        specs[CONFIG_KEY] = (stored.dtype, tuple(stored.shape))
        metadata = file_metadata(config) | {key: text for key, text in file.metadata.items() if key != CONFIG_KEY}
        with TensorWriter(os.fspath(target), specs, metadata) as writer:
            for name in writer.names:
                writer.put(name, stored if name == CONFIG_KEY else file.tensor(name))
                file.release(name)
            writer.finish(metadata)

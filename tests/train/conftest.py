"""Fixtures that several tests of the trainer share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toys.pipeline import save_pipeline
from tests.toys.teachers import save_flux


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline's folder with random, tiny encoders; not to be written to."""
    return save_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A dense FLUX of few blocks, in a file."""
    save_flux(tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"

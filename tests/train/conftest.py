"""Fixtures that several tests of the trainer share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toys.pipeline import save_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline's folder with random, tiny encoders; not to be written to."""
    return save_pipeline(tmp_path_factory.mktemp("models") / "pipeline")

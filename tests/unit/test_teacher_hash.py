"""The hash that is taken beside a conversion."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from d2m_model.conversion import digest
from d2m_model.conversion.digest import PacedDigest
from d2m_model.tensor_file import CheckpointError


@pytest.mark.parametrize("steps", [(0, 50_000, 90_000), (90_000, 10), (100_000,), ()])
def test_the_hash_is_right_however_its_companion_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    monkeypatch.setattr(digest, "_CHUNK", 1000)
    monkeypatch.setattr(digest, "_LEAD", 3000)
    content = torch.randint(0, 256, (100_000,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "a").write_bytes(content[:33_333])
    (tmp_path / "b").write_bytes(content[33_333:])
    with PacedDigest([tmp_path / "a", tmp_path / "b"]) as paced:
        for position in steps:
            paced.reach(position)
            assert paced.hashed + 3000 >= position
            assert paced.hashed <= max(steps) + 3000 + 1000
        assert paced.result() == hashlib.sha256(content).hexdigest()


def test_what_cannot_be_read_is_an_error_and_nobody_waits_for_it(tmp_path: Path) -> None:
    with PacedDigest([tmp_path / "none"]) as paced, pytest.raises(CheckpointError, match="none: cannot be read"):
        paced.reach(1 << 40)
    with PacedDigest([tmp_path / "none"]) as paced, pytest.raises(CheckpointError, match="none: cannot be read"):
        paced.result()

"""The run for a GPU, rehearsed on a CPU: it must not fail for a reason of its own on a machine that is lent for minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


def test_every_section_is_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    sizes = ["--hidden", "64", "--tokens", "8", "--rounds", "1", "--no-whole-model"]
    assert gpu.main(["--device", "cpu", *sizes, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"commit", "machine", "rates", "values", "float8", "ffn"}
    assert result["values"]["torch, float16"]["result"] < 3e-3
    assert result["values"]["kernels, bfloat16"]["gradients"] < 3e-2
    assert {row["way"] for row in result["ffn"]} == {"kernels", "torch", "every expert"}


def test_a_section_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "check_experts", broken)
    monkeypatch.setattr(gpu, "measure_ways", lambda *_: [])
    out = tmp_path / "device.json"
    assert gpu.main(["--device", "cpu", "--hidden", "64", "--no-whole-model", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert "no kernel image" in result["values"]["failed"]
    assert result["ffn"] == []

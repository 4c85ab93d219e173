"""Lines that a run prints before its first stage and after its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from d2m_train.commands.summary import end_text, memory_text
from d2m_train.progress import duration
from d2m_train.run_config import RunConfig

EMOJI = {
    "output_dir": "out",
    "teacher": {"path": "flux.safetensors", "dims": "emoji"},
    "student": {"preset": "L"},
    "data": {"source": "emoji"},
}


def test_times_have_two_units() -> None:
    assert [duration(seconds) for seconds in (3.4, 65, 3600 * 30 + 120)] == ["3 s", "1 min 5 s", "30 h 2 min"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"source": "emoji"}, "--data emoji"),
        (
            {"source": "prompts", "path": "my prompts.txt", "text_encoders": "flux"},
            "--data 'my prompts.txt' --text-encoders flux",
        ),
    ],
)
def test_the_next_command_has_the_runs_own_names(data: dict[str, Any], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "student.safetensors"
    file.write_bytes(bytes(1000))
    said = end_text(RunConfig.model_validate(EMOJI | {"data": data}), file, 5, torch.device("cpu"))
    assert f"Next: python -m d2m_train evaluate {file} --teacher flux.safetensors {expected}" in said.splitlines()


def test_the_memory_of_every_stage_is_planned_where_it_can_be() -> None:
    said = memory_text(RunConfig.model_validate(EMOJI | {"stages": ["convert", "shared"]}), 1, "single")
    assert said is not None
    assert said.startswith("Planned memory of a GPU: shared 0.")
    unknown = RunConfig.model_validate(EMOJI | {"teacher": {"path": "flux.safetensors"}})
    assert memory_text(unknown, 1, "single") is None

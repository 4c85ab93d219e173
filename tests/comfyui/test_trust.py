"""A small part of the standing tests of trust (`make trust`), and what they judge by."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save

from d2m_model.tensor_file import CheckpointError
from demo.in_process import Comfy
from tests.trust import files, subjects
from tests.trust.limits import Fault, Hang, growth, time_limit
from tests.trust.mutations import mutated, taken_apart
from tests.trust.packages import judged
from tests.trust.requests import raw_error_of_ours
from tools.host import ROOT

NUMBERS = range(12)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return subjects.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def readers(host: Comfy, models: dict[str, Path]) -> files.Readers:
    return files.Readers(host, models["FLUX-MoE"])


def test_mutated_files_give_a_clear_error_or_a_correct_load(
    readers: files.Readers, models: dict[str, Path], tmp_path: Path
) -> None:
    outcomes = set()
    for number in NUMBERS:
        random = Random(f"small-{number}")
        data = mutated(models[random.choice(sorted(models))].read_bytes(), random)
        (tmp_path / "case.safetensors").write_bytes(data)
        for reader in (readers.check, readers.inspect, readers.load):
            outcomes.add(files.outcome_of(reader, tmp_path / "case.safetensors", len(data)))
    assert outcomes <= {"refused", "taken"}


def test_what_is_judged_is_found(readers: files.Readers, models: dict[str, Path], tmp_path: Path) -> None:
    def reader(path: Path) -> bool:
        raise KeyError("layers")

    def escaping(path: Path) -> bool:
        error = CheckpointError("")
        error.args = ("\x1b[31m",)
        raise error

    def greedy(path: Path) -> bool:
        return bool(bytearray(100 << 20))

    sound = models["FLUX-MoE"]
    assert "KeyError: 'layers'" in files.outcome_of(reader, sound, 1)
    assert "cannot be printed" in files.outcome_of(escaping, sound, 1)
    assert "bytes of memory" in files.outcome_of(greedy, sound, 1)
    assert files.outcome_of(readers.check, sound, sound.stat().st_size) == "taken"
    with pytest.raises(Hang), time_limit(0.01):
        time.sleep(5)


def test_mutations_change_a_file_and_are_repeatable() -> None:
    config = torch.tensor(list(json.dumps({"dims": {"single_blocks": 2}, "groups": []}).encode()), dtype=torch.uint8)
    data = save({"d2m_config": config, "img_in.weight": torch.ones(4, 4)})
    some = [mutated(data, Random(number)) for number in range(200)]
    assert some == [mutated(data, Random(number)) for number in range(200)]
    assert sum(one != data for one in some) > 150
    headers = [parts[0] for one in some if (parts := taken_apart(one)) is not None]
    assert 50 < len(headers) < 190, "some can be read, and some cannot"
    assert any(set(header) != {"d2m_config", "img_in.weight"} for header in headers)


def test_raw_errors_of_the_pack_are_found_in_a_log() -> None:
    def log(file: str, line: str, error: str) -> str:
        host = '  File "/x/ComfyUI/execution.py", line 5, in execute\n    run()\n'
        return f'got prompt\nTraceback (most recent call last):\n{host}  File "{file}", line 7, in f\n    {line}\n{error}\n'

    for pack in (f"{ROOT}/nodes/cost.py", "/x/.host/custom_nodes/ComfyUI-Dense2MoE/nodes/cost.py"):
        raw = log(pack, "x = y[0]", "IndexError: list index out of range")
        assert raw_error_of_ours(raw) is not None
        assert raw_error_of_ours(log(pack, 'raise ValueError("x")', "ValueError: x")) is None
        below = raw.replace(
            "IndexError", '  File "/x/ComfyUI/.venv/site-packages/torch/nn.py", line 1, in g\n    h()\nE'
        )
        assert raw_error_of_ours(below) is not None, "a library that the pack calls"
        host = raw.replace("IndexError", '  File "/x/ComfyUI-0.30.0/comfy/sd.py", line 1, in g\n    h()\nRuntimeError')
        assert raw_error_of_ours(host) is None
    assert raw_error_of_ours(log("/x/ComfyUI/comfy/sd.py", "x = y[0]", "IndexError: x")) is None


def test_memory_that_grows_is_found() -> None:
    assert growth([10, *[100, 104, 100] * 20], 0)["memory_growth"] == 0, "it may grow until it is warm"
    with pytest.raises(Fault, match="memory grew"):
        growth(range(100, 160), 0)
    assert growth(range(100, 160), 40)["memory_bytes"] == 120


def test_a_vulnerability_is_reported_and_a_package_that_was_not_audited_is_not_counted() -> None:
    sound = {"name": "a", "version": "1", "vulns": []}
    skipped = {"name": "b", "skip_reason": "not found"}
    wrong = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": []}]}
    assert judged({"dependencies": [sound, skipped, wrong]}) == (3, 2, ["c 2 (CVE-1)"])

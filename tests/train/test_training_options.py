"""Options of `training` that must not change what is learned, and those that this machine cannot have."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from d2m_train import UserError
from d2m_train.__main__ import main
from d2m_train.monitor.stage_log import read_stage_log
from d2m_train.run_config import StageSection, TrainingSection
from d2m_train.training.optimizers import new_optimizer
from tests.toys.runs import FLAT, run_file, write_inputs

Losses = list[dict[str, float]]
STAGES = ("stages=[convert, experts]", "stage.shared.steps=0")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    write_inputs(folder, FLAT)
    assert main(["distill", str(run_file(folder)), "stages=[convert]"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(converted: Path) -> Callable[..., Losses]:
    """Stage `experts` from the one conversion with some options: what the steps logged."""

    def run(name: str, *options: str) -> Losses:
        out = converted / name
        shutil.copytree(converted / "out", out)
        (out / "run.yaml").unlink()
        assert main(["distill", str(run_file(converted)), f"output_dir={out}", *STAGES, *options]) == 0
        return [line for line in read_stage_log(out / "experts" / "log.jsonl") if "loss/total" in line]

    return run


@pytest.fixture(scope="module")
def plain(run: Callable[..., Losses]) -> Losses:
    return run("plain")


def assert_same(found: Losses, expected: Losses, relative: float) -> None:
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        for part in ("loss/total", "loss/output", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=relative), (a["step"], part)


def test_fused_adamw_learns_what_the_plain_one_learns(run: Callable[..., Losses], plain: Losses) -> None:
    assert_same(run("fused", "training.optimizer=adamw_fused"), plain, 1e-5)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_learn_what_the_others_learn(run: Callable[..., Losses], plain: Losses) -> None:
    """The backend needs no C++ compiler, but has dynamo's and autograd's graphs."""
    assert_same(run("compiled", "training.compile=aot_eager"), plain, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_compiler_that_torch_lacks_is_named(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = converted / "miscompiled"
    shutil.copytree(converted / "out", out)
    (out / "run.yaml").unlink()
    file = str(run_file(converted))
    assert main(["distill", file, f"output_dir={out}", "stages=[shared]", "training.compile=inducktor"]) == 2
    assert "training.compile is inducktor; expected true, false or a backend of torch: " in capsys.readouterr().err


def test_fp16_without_a_gpu_is_refused_ahead_of_the_conversion(
    converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = converted / "fp16"
    assert main(["distill", str(run_file(converted)), f"output_dir={out}", "training.mixed_precision=fp16"]) == 2
    assert "fp16, which needs a GPU, and there is none; expected bf16 or no" in capsys.readouterr().err
    assert not out.exists()


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def test_8_bit_adamw_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"bitsandbytes is not installed: pip install bitsandbytes, or training\.optimizer="
    ):
        new_optimizer(parameters(), StageSection(), TrainingSection(optimizer="adamw_8bit"))


def test_8_bit_adamw_is_bitsandbytes_own_with_the_runs_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            self.given = options
            super().__init__(params, **options)

    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    training = TrainingSection(optimizer="adamw_8bit", betas=(0.8, 0.9), weight_decay=0.1, warmup_steps=4)
    optimizer, schedule = new_optimizer(parameters(), StageSection(steps=8, learning_rate=0.5), training)
    assert type(optimizer) is AdamW8bit
    assert optimizer.given == {"lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.1}
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 4), "the schedule is this optimizer's"

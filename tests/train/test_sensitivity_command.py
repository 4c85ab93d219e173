"""Measurement of a file's sensitivity: against finite differences of the whole model, and the file that is written."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")

from d2m_model.checkpoint import CONFIG_KEY, check_file
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, ffn_linears, load_transformer
from d2m_model.routers import CapacityRouter
from d2m_model.sensitivity import Sensitivity
from d2m_train import UserError
from d2m_train.__main__ import main
from d2m_train.conversion import sensitivity
from d2m_train.conversion.sensitivity import SensitivitySettings, measure_sensitivity
from d2m_train.data.latents import LatentFile
from tests.toys.pairs import GROUPS, Pair, save_pair

SETTINGS = SensitivitySettings(mu=0.5, seed=0, bins=2, batches=1, batch_size=2, probes=64)
_velocity = sensitivity.velocity


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"), groups=GROUPS)


@pytest.fixture(scope="module")
def data(pair: Pair) -> Path:
    generator = torch.Generator().manual_seed(1)
    shapes = {"latents": (2, 16, 4, 4), "context": (2, 3, 32), "pooled": (2, 48)}
    file = pair.dense.with_name("data.safetensors")
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, file)
    return file


@pytest.fixture(scope="module")
def measured(pair: Pair, data: Path) -> tuple[Sensitivity, list[tuple[Any, ...]]]:
    """The table, and the arguments of the teacher's forward pass in each bin."""
    calls: list[tuple[Any, ...]] = []

    def velocity(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return _velocity(*arguments)

    teacher, student = load_transformer(pair.dense), FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "velocity", velocity)
        table = measure_sensitivity(
            teacher.requires_grad_(False), student.requires_grad_(False), LatentFile(data), SETTINGS
        )
    return table, calls


def change_of_velocity(arguments: tuple[Any, ...], module: torch.nn.Module, change: Any) -> float:
    """Mean square of the velocity's derivative in the direction of `change(input, output)` of a module's output."""
    _, *rest = arguments
    step = 1e-2
    with torch.no_grad():
        dense = _velocity(arguments[0], *rest)
        handle = module.register_forward_hook(lambda _, given, out: change(given, out, step))
        moved = _velocity(arguments[0], *rest)
        handle.remove()
    return float(((moved - dense) / step).square().mean())


@pytest.mark.parametrize("name", ["double_blocks.1.txt_mlp", "single_blocks.2"])
def test_an_ffns_error_is_the_change_of_the_velocity(
    measured: tuple[Sensitivity, list[tuple[Any, ...]]], pair: Pair, name: str
) -> None:
    table, calls = measured
    moe = FluxMoETransformer2DModel.from_flux_moe(pair.moe).moe_ffns()[name]
    up, down, _ = {found: rest for found, *rest in ffn_linears(calls[0][0])}[name]
    seen: list[Tensor] = []
    for number, arguments in enumerate(calls):
        moe.router_value = 12
        handle = up.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

        def change(given: Any, out: Tensor, step: float) -> Tensor:
            moe.router_value = 12
            dense = moe(seen[-1])
            moe.router_value = 3
            return out + step * (moe(seen[-1]) - dense)

        expected = change_of_velocity(arguments, down, change)
        handle.remove()
        assert table.ffns[name][number][3] == pytest.approx(expected, rel=0.3)
        assert table.ffns[name][number][12] < 1e-4 * expected  # the dense FFN


def test_a_group_that_runs_all_of_its_blocks_has_no_error(
    measured: tuple[Sensitivity, list[tuple[Any, ...]]],
) -> None:
    table, _ = measured
    assert [len(errors[0]) for errors in table.groups] == [3, 4]
    for errors in table.groups:
        for row in errors:
            assert row[-1] == 0
            assert min(row[:-1]) > 0


def test_noise_levels_have_equal_shares_of_the_schedule(
    measured: tuple[Sensitivity, list[tuple[Any, ...]]],
) -> None:
    table, calls = measured
    assert table.levels == pytest.approx((1, 0.6225, 0), abs=1e-4)
    for number, (_, _, _, t_B, *_) in enumerate(calls):
        assert all(table.levels[number] >= t >= table.levels[number + 1] for t in t_B.tolist())


def test_the_command_changes_nothing_but_the_table(pair: Pair, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = ["sensitivity", pair.moe, "--teacher", pair.dense, "--data", data, "--out", out]
    command += ["--bins", 2, "--batches", 1, "--batch-size", 1, "--probes", 1]
    assert main([str(argument) for argument in command]) == 0
    before, after = load_file(pair.moe), load_file(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != CONFIG_KEY)
    table = check_file(out).sensitivity
    assert table is not None
    assert (table.samples, table.data, table.image_tokens, table.text_tokens) == (1, "data.safetensors", 4, 3)
    # Again, over the file itself.
    assert main([*(str(argument) for argument in command[:1]), str(out), *map(str, command[2:]), "--overwrite"]) == 0
    assert check_file(out).sensitivity == table


def test_a_file_that_cannot_be_measured_is_refused(data: Path, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, capacity=CapacityRouter(capacity=2.0, width=8))
    teacher, student = load_transformer(pair.dense), FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    with pytest.raises(UserError, match="capacity router"):
        measure_sensitivity(teacher, student, LatentFile(data), SETTINGS)


def test_a_conversion_with_data_measures_too(
    pair: Pair, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = partial(SensitivitySettings, bins=2, batches=1, batch_size=1, probes=1)
    monkeypatch.setattr("d2m_train.commands.convert.SensitivitySettings", short)
    out = tmp_path / "out.safetensors"
    command = [str(part) for part in ("convert", "--teacher", pair.dense, "--out", out, "--sensitivity")]
    assert main(command) == 2
    assert "--sensitivity needs --data" in capsys.readouterr().err
    options = ["--data", str(data), "--batches", "4", "--batch-size", "2", "--importance", "weight-norm"]
    assert main([*command, *options]) == 0
    config = check_file(out)
    assert config.sensitivity is not None
    assert config.sensitivity.ffns.keys() == config.ffns.keys()
    assert config.provenance["preset"] == "L"

"""`python -m d2m_train`: what a user types and reads."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model import VERSION
from d2m_model.checkpoint import check_file, optional_tensors
from d2m_model.cost import Conversion, Tokens, flux
from d2m_model.routers import CapacityRouter
from d2m_train.__main__ import _COMMANDS, EXAMPLES, main
from tests.toys import files
from tests.toys.teachers import DIMS, dense_flux, save_flux

ROOT = Path(__file__).parents[2]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_flux(tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on standard error of a command that must exit with 2."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_the_version_is_the_packs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dense2moe-flux {VERSION}\n"


def test_every_command_has_examples_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert EXAMPLES.keys() == _COMMANDS.keys()
    for name, examples in EXAMPLES.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = capsys.readouterr().out
        monkeypatch.setattr(f"d2m_train.commands.{name}.run", lambda args: 0)
        for example in examples:
            assert f"  python -m d2m_train {example}\n" in shown
            if example != "distill --fields":
                assert main(example.split()) == 0, example


def test_convert_then_inspect(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = tmp_path / "moe.safetensors"
    assert main(["convert", "--teacher", str(teacher), "--out", str(moe)]) == 0
    said = capsys.readouterr().out
    assert "4 FFNs, each 128 shared neurons and 12 experts of 32; top-2" in said
    assert "rank 11" in said
    assert main(["inspect", str(moe), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "FLUX-MoE"
    assert facts["dims"]["hidden_size"] == 128
    assert facts["moe"]["top_k"] == 2
    assert facts["moe"]["gate"] == {"mode": "sum", "scale": 1.0}
    assert facts["moe"]["split_only"] is False
    assert facts["moe"]["adaln_rank"] == 11
    assert list(facts["moe"]["ffns"]) == [
        *(f"double_blocks.1.{stream}" for stream in ("img_mlp", "txt_mlp")),
        *(f"single_blocks.{i}" for i in range(2)),
    ]
    provenance = facts["moe"]["provenance"]
    assert provenance["importance"] == "weight-norm"
    assert (provenance["experts"], provenance["router"], provenance["refit"]) == ("dealt", "centroid", False)
    assert provenance["tool"] == f"ComfyUI-Dense2MoE {VERSION}"
    dense = sum(tensor.numel() for tensor in load_file(teacher).values())
    compressed = 11 * 128 - (2 * 2 * 6 + 2 * 3) * 128 * (128 - 11)
    assert facts["parameters"] == dense + 4 * 12 * 128 + compressed
    idle = 4 * 10 * 32 * (2 * 128 + 1)  # ten of twelve experts: rows, biases and columns of 32 neurons
    assert facts["activated_parameters"]["touched"] == facts["parameters"] - idle
    assert main(["inspect", str(moe)]) == 0
    text = capsys.readouterr().out
    assert "FLUX-MoE, schema 1" in text
    assert "4 of 6 FFNs: 128 shared neurons, 12 experts of 32" in text
    assert "Apache-2.0" in text
    assert "checked" in text


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_teacher_with_nan_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    tensors = files.dense_flux()
    tensors["single_blocks.1.linear2.weight"][5, 3] = value
    teacher = files.save(tensors, tmp_path / "teacher.safetensors", torch.bfloat16)
    expected = "teacher.safetensors: single_blocks.1.linear2.weight has NaN or infinite values"
    assert expected in fails(capsys, "inspect", teacher)
    assert expected in fails(capsys, "convert", "--teacher", teacher, "--out", tmp_path / "moe.safetensors")
    assert list(tmp_path.iterdir()) == [teacher]


def test_inspect_looks_at_every_value_and_shows_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = files.split(files.dense_flux())
    config = json.loads(bytes(tensors["d2m_config"].numpy()))
    config["teacher"]["title"] = "\x1b[2Jtiny"
    tensors["d2m_config"] = files.config_tensor(json.dumps(config))
    file = files.save(tensors, tmp_path / "moe.safetensors")
    assert main(["inspect", str(file)]) == 0
    assert r"\x1b[2Jtiny" in (shown := capsys.readouterr().out)
    assert shown.isascii()
    tensors["txt_in.weight"][0, 0] = float("nan")
    assert "txt_in.weight has NaN" in fails(capsys, "inspect", files.save(tensors, file))


def test_inspect_a_dense_flux(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(teacher)]) == 0
    assert "dense FLUX.1" in capsys.readouterr().out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "latents": torch.randn(2, 16, 4, 4, generator=generator),
        "context": torch.randn(2, 3, 32, generator=generator),
        "pooled": torch.randn(2, 48, generator=generator),
    }
    save_file(tensors, tmp_path / "data.safetensors")
    return tmp_path / "data.safetensors"


def test_with_data_every_option_is_on_and_reported(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    moe = tmp_path / "moe.safetensors"
    command = ["convert", "--teacher", teacher, "--out", moe, "--data", data, "--batches", 4, "--batch-size", 1]
    assert main([str(argument) for argument in command]) == 0
    said = capsys.readouterr().out
    assert "at top-2, on tokens that no fit has seen:\n  random 0." in said
    report = json.loads((tmp_path / "moe.safetensors.report.json").read_text())
    ffns = ["double_blocks.1.img_mlp", "double_blocks.1.txt_mlp", "single_blocks.0", "single_blocks.1"]
    assert sorted(report["ffns"]) == ffns
    assert all(list(of) == ["random", "centroid", "ridge", "oracle", "converted"] for of in report["ffns"].values())
    assert len(report["modulations"]) == 6
    assert not list(tmp_path.glob("*.calibration")), "left behind"
    tensors = load_file(moe)
    assert tensors["single_blocks.0.router.bias"].shape == (12,)
    assert tensors["single_blocks.0.expert_mean"].shape == (12, 128)
    assert tensors["adaln_in.weight"].shape == (11, 128)
    assert main(["inspect", str(moe), "--json"]) == 0
    provenance = json.loads(capsys.readouterr().out)["moe"]["provenance"]
    assert provenance["data"] == {"name": "data.safetensors", "batches": 4, "batch_size": 1}
    options = ("importance", "experts", "router", "mean", "refit", "top_k")
    assert [provenance[option] for option in options] == ["taylor", "coactivation", "ridge", True, True, 2]


def test_split_only_leaves_the_weights_the_teachers(teacher: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    moe, kept = tmp_path / "moe.safetensors", tmp_path / "kept"
    command = ["convert", "--teacher", teacher, "--out", moe, "--data", data, "--split-only", "--calibration", kept]
    assert main([*map(str, command), "--batches", "2", "--batch-size", "2"]) == 0
    assert len(list(kept.iterdir())) == 2, "the calibration was to be kept"
    dense, tensors = load_file(teacher), load_file(moe)
    assert "single_blocks.0.expert_mean" in tensors
    assert tensors["double_blocks.0.img_mod.lin.weight"].shape == (768, 128)
    order = tensors["double_blocks.1.img_mlp.neuron_order"].long()
    assert torch.equal(tensors["double_blocks.1.img_mlp.2.weight"], dense["double_blocks.1.img_mlp.2.weight"][:, order])


def test_groups_and_capacity_are_chosen_and_shown(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    teacher, moe = tmp_path / "deep.safetensors", tmp_path / "moe.safetensors"
    save_file(dense_flux(replace(DIMS, double_blocks=4, single_blocks=5)), teacher)
    method = ("--experts", "dealt", "--importance", "weight-norm", "--predictor-width", "8", "--top-k", "3")
    command = [
        "convert",
        "--teacher",
        teacher,
        "--out",
        moe,
        "--data",
        data,
        "--batches",
        4,
        "--batch-size",
        2,
        *method,
    ]
    command += [
        "--preset",
        "XS",
        "--groups",
        "double:1-3,single:0-3/2",
        "--selection",
        "window",
        "--router-kind",
        "capacity",
        "--stand-ins",
    ]
    assert main([str(argument) for argument in command]) == 0
    said = capsys.readouterr().out
    assert "2 of the single blocks 0 to 3 run at a time (window)." in said
    assert "capacity predictors agree" in said
    assert main(["inspect", str(moe)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "group double blocks 1 to 3, 1 active (window)" in text
    assert "group single blocks 0 to 3, 2 active (window)" in text
    assert "stand-ins for skipped blocks, of rank 32" in text
    assert "routing by capacity, 3 experts a token on average, predictor 8 wide, gate sum" in text
    assert main(["inspect", str(moe), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["moe"]["capacity_router"] == {"capacity": 3.0, "width": 8}
    config = check_file(moe)
    activated = Conversion(
        ffns=config.ffns,
        groups=config.groups,
        adaln_rank=11,
        experts_per_token=3,
        router=CapacityRouter(capacity=3, width=8),
        stand_in_rank=32,
    )
    cost = flux(config.dims, activated, Tokens(image=1, text=1))
    assert facts["activated_parameters"]["touched"] == round(cost.touched)
    # What a file may have besides, and no cost counts: with data, routers have biases and experts means.
    besides = sum(math.prod(shape) for shape in optional_tensors(config).values())
    assert facts["parameters"] == round(cost.total) + besides


def test_options_change_the_file_and_the_seed_repeats_it(teacher: Path, tmp_path: Path) -> None:
    def order_and_router(*options: str) -> tuple[torch.Tensor, torch.Tensor]:
        file = tmp_path / "moe.safetensors"
        assert main(["convert", "--teacher", str(teacher), "--out", str(file), "--overwrite", *options]) == 0
        tensors = load_file(tmp_path / "moe.safetensors")
        return tensors["single_blocks.0.neuron_order"], tensors["single_blocks.0.router.weight"]

    paper = ("--experts", "random", "--router", "random")
    dealt, random, again, other = [order_and_router(), *(order_and_router(*paper, "--seed", s) for s in "001")]
    for i in range(2):
        assert torch.equal(random[i], again[i])
        assert not torch.equal(random[i], other[i])
        assert not torch.equal(random[i], dealt[i])


def test_mistakes_give_one_clear_line(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moe.safetensors"
    convert = ("convert", "--teacher", teacher, "--out", out)
    assert "no such file" in fails(capsys, "inspect", tmp_path / "none.safetensors")
    assert "no such file" in fails(capsys, "convert", "--teacher", tmp_path / "none", "--out", out)
    assert "Preset XS needs 4 double blocks or more; this FLUX has 2" in fails(capsys, *convert, "--preset", "XS")
    needs = ("--importance taylor", "--experts coactivation", "--router ridge", "--refit", "--groups auto")
    for option in (
        *(tuple(option.split()) for option in needs),
        ("--block-router", "ridge"),
        ("--router-kind", "capacity"),
        ("--baseline", "depth_pruning"),
    ):
        assert f"{' '.join(option)} needs --data emoji or --data FILE" in fails(capsys, *convert, *option)
    assert "--adaln-rank changes weights, which --split-only forbids" in fails(
        capsys, *convert, "--split-only", "--adaln-rank", "8"
    )
    assert "--adaln-rank is 129; expected 1 to 128" in fails(capsys, *convert, "--adaln-rank", "129")
    assert "--top-k is 13; expected 1 to 12" in fails(capsys, *convert, "--top-k", "13")
    assert "this is the teacher" in fails(capsys, "convert", "--teacher", teacher, "--out", teacher)
    assert "there is no such folder" in fails(
        capsys, "convert", "--teacher", teacher, "--out", tmp_path / "no" / "moe.safetensors"
    )
    assert not out.exists()
    main([str(argument) for argument in convert])
    capsys.readouterr()
    assert "a FLUX-MoE already" in fails(capsys, "convert", "--teacher", out, "--out", tmp_path / "again.safetensors")
    out.write_bytes(out.read_bytes()[:-1])
    assert "truncated" in fails(capsys, "inspect", out)


def test_calibration_data_that_do_not_fit_are_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    data, out = tmp_path / "data.safetensors", tmp_path / "moe.safetensors"
    convert = ("convert", "--teacher", teacher, "--out", out, "--data", data)
    good = {"latents": torch.randn(2, 16, 4, 4), "context": torch.randn(2, 3, 32), "pooled": torch.randn(2, 48)}
    save_file(good | {"context": torch.randn(2, 3, 4096)}, data)
    assert "context are 4096 wide; this teacher's are 32" in fails(capsys, *convert)
    save_file({name: tensor for name, tensor in good.items() if name != "pooled"}, data)
    assert "pooled is None; expected a .safetensors with `latents`" in fails(capsys, *convert)
    save_file(good | {"latents": torch.randn(2, 16, 5, 4)}, data)
    assert "even height and width" in fails(capsys, *convert)
    assert not out.exists()


def test_a_missing_trainer_package_is_named(
    teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError):
        import tqdm  # noqa: F401
    assert "pip install 'dense2moe-flux[train]'" in fails(
        capsys, "convert", "--teacher", teacher, "--out", teacher.with_name("moe")
    )


def test_the_command_line_from_a_shell(tmp_path: Path) -> None:
    """Exit status and no traceback; and what needs no diffusers does not import it."""
    (tmp_path / "bad.safetensors").write_text("<html>")
    code = (
        "import sys, d2m_train.__main__ as m; status = m.main(sys.argv[1:]); "
        "sys.exit(9 if {'diffusers', 'transformers'} & set(sys.modules) else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "bad.safetensors")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    said = f"error: {tmp_path / 'bad.safetensors'}: not a safetensors file, but a web page"
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    help_text = subprocess.run(
        [sys.executable, "-m", "d2m_train", "convert", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert "no refit, no AdaLN compression" in " ".join(help_text.split())


def test_the_version_is_that_of_the_package() -> None:
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()

"""A FLUX-MoE becomes dense again: bit for bit the teacher if it was only split (promise 5 of the file format)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model.checkpoint import CheckpointError, check_file
from d2m_model.config import BlockGroup, FluxMoEConfig, Gate, preset_layouts
from d2m_model.conversion.convert import convert_file, describe_teacher
from d2m_model.conversion.interfaces import FFNPlan, FFNWeights
from d2m_model.conversion.unconvert import unconvert_file
from d2m_model.routers.token_router import BIAS, WEIGHT
from d2m_model.teacher import open_teacher
from d2m_train.__main__ import main
from tests.toys.teachers import DIMS, METADATA, dense_flux, diffusers_tensors, save_flux

RANK = 11
GROUP = BlockGroup(kind="single", first=0, blocks=2, active=1, selection="topk")


class Projection:
    """Modulations through a random U, with lin' = lin Uᵀ."""

    def __init__(self) -> None:
        basis = torch.randn(DIMS.hidden_size, RANK, generator=torch.Generator().manual_seed(1))
        self.adaln_in_AH = torch.linalg.qr(basis).Q.T.contiguous()

    def compress(self, name: str, weight_OH: torch.Tensor, bias_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight_OH.float() @ self.adaln_in_AH.T, bias_O.float() + 1


def convert(
    teacher_path: Path, target: Path, *, refit: bool = False, compress: bool = False, groups: bool = False
) -> FluxMoEConfig:
    """Random order and routers, with router biases and expert means."""
    generator = torch.Generator().manual_seed(0)

    def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
        return FFNPlan(
            order_N=torch.randperm(DIMS.neurons, generator=generator, dtype=torch.int32),
            router={
                WEIGHT: torch.randn(12, DIMS.hidden_size, generator=generator),
                BIAS: torch.randn(12, generator=generator),
            },
            expert_mean_EH=torch.randn(12, DIMS.hidden_size, generator=generator),
            shared_down_HS=torch.full((128, 128), 2.5) if refit else None,
            down_bias_H=torch.full((128,), 1.5) if refit else None,
        )

    routers = {f"block_groups.0.router_{x}.weight": torch.randn(2, DIMS.hidden_size) for x in "xy"}
    with open_teacher(teacher_path) as teacher:
        config = FluxMoEConfig(
            dims=teacher.dims,
            ffns=preset_layouts(teacher.dims),
            groups=(GROUP,) if groups else (),
            gate=Gate(mode="sum", scale=1.0),
            top_k=2,
            adaln_rank=RANK if compress else None,
            split_only=not refit and not compress,
            teacher=describe_teacher(teacher),
        )
        config = convert_file(
            teacher,
            target,
            config,
            plan,
            modulations=Projection() if compress else None,
            router_bias=True,
            expert_mean=True,
            block_groups=routers if groups else None,
        )
    assert check_file(target) == config
    return config


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("groups", [False, True], ids=["all blocks run", "with block groups"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_split_only_file_gives_back_the_teacher_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, prefix: str, groups: bool
) -> None:
    teacher = save_flux(tmp_path / "teacher.safetensors", prefix=prefix, dtype=dtype)
    config = convert(tmp_path / "teacher.safetensors", tmp_path / "moe.safetensors", groups=groups)
    moe = load_file(tmp_path / "moe.safetensors")
    moved = sum(not torch.equal(moe[name].view(torch.uint8), teacher[name].view(torch.uint8)) for name in teacher)
    assert moved == 3 * len(config.ffns)
    unconvert_file(tmp_path / "moe.safetensors", tmp_path / "dense.safetensors")
    assert_same_bytes(load_file(tmp_path / "dense.safetensors"), teacher)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_teacher_comes_back_with_its_values_in_bfloat16(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = save_flux(tmp_path / "teacher.safetensors", dtype=dtype)
    convert(tmp_path / "teacher.safetensors", tmp_path / "moe.safetensors")
    unconvert_file(tmp_path / "moe.safetensors", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert_same_bytes(dense, {name: tensor.bfloat16() for name, tensor in teacher.items()})
    assert all(torch.equal(dense[name].float(), tensor.float()) for name, tensor in teacher.items())


def test_a_teacher_in_diffusers_names_comes_back_in_bfls(tmp_path: Path) -> None:
    teacher = dense_flux()
    theirs = {name: tensor.contiguous().clone() for name, tensor in diffusers_tensors(teacher, DIMS).items()}
    save_file(theirs, tmp_path / "teacher.safetensors")
    convert(tmp_path / "teacher.safetensors", tmp_path / "moe.safetensors")
    unconvert_file(tmp_path / "moe.safetensors", tmp_path / "dense.safetensors")
    assert_same_bytes(load_file(tmp_path / "dense.safetensors"), teacher)


def test_of_a_refitted_file_the_rest_is_the_teachers(tmp_path: Path) -> None:
    teacher = save_flux(tmp_path / "teacher.safetensors")
    config = convert(tmp_path / "teacher.safetensors", tmp_path / "moe.safetensors", refit=True)
    order = load_file(tmp_path / "moe.safetensors")["single_blocks.1.neuron_order"].long()
    unconvert_file(tmp_path / "moe.safetensors", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    down = teacher["single_blocks.1.linear2.weight"].clone()
    down[:, 128 + order[:128]] = 2.5  # where the shared expert's neurons were in the teacher
    assert torch.equal(dense["single_blocks.1.linear2.weight"], down)
    assert dense["single_blocks.1.linear2.bias"].eq(1.5).all()
    changed = {name for name in teacher if not torch.equal(dense[name], teacher[name])}
    downs = {ffn + (".2" if ffn.startswith("double") else ".linear2") for ffn in config.ffns}
    assert changed == {f"{down}.{kind}" for down in downs for kind in ("weight", "bias")}


def test_compressed_modulations_are_multiplied_out(tmp_path: Path) -> None:
    teacher = save_flux(tmp_path / "teacher.safetensors", dtype=torch.float32)
    convert(tmp_path / "teacher.safetensors", tmp_path / "moe.safetensors", compress=True)
    unconvert_file(tmp_path / "moe.safetensors", tmp_path / "dense.safetensors")
    dense, basis = load_file(tmp_path / "dense.safetensors"), Projection().adaln_in_AH
    for lin in ("double_blocks.0.img_mod.lin", "double_blocks.1.txt_mod.lin", "single_blocks.1.modulation.lin"):
        torch.testing.assert_close(dense[f"{lin}.weight"], teacher[f"{lin}.weight"] @ basis.T @ basis)
        assert torch.equal(dense[f"{lin}.bias"], teacher[f"{lin}.bias"] + 1)
    unchanged = [name for name in teacher if "mod" not in name or name.startswith("final_layer")]
    assert all(torch.equal(dense[name], teacher[name]) for name in unchanged)


def test_the_command_says_whether_it_is_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_flux(tmp_path / "teacher.safetensors")
    moe, out = tmp_path / "moe.safetensors", tmp_path / "dense.safetensors"
    config = convert(tmp_path / "teacher.safetensors", moe)
    assert main(["unconvert", str(moe), "--out", str(out)]) == 0
    assert f"those of Small FLUX (sha256 {config.teacher.sha256}), bit for bit" in capsys.readouterr().out
    convert(tmp_path / "teacher.safetensors", moe, refit=True)
    before = out.read_bytes()
    assert main(["unconvert", str(moe), "--out", str(out)]) == 2
    assert "exists already. Give --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["unconvert", str(moe), "--out", str(out), "--overwrite"]) == 0
    assert "not the weights of Small FLUX: its weights were changed after the split" in capsys.readouterr().out
    convert(tmp_path / "teacher.safetensors", moe, compress=True)
    assert main(["unconvert", str(moe), "--out", str(out), "--overwrite"]) == 0
    assert "not the weights of Small FLUX: its modulations were compressed to rank 11" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "dense FLUX.1" in said
    assert METADATA["modelspec.license"] in said


def test_what_cannot_be_unconverted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_flux(tmp_path / "teacher.safetensors")
    moe, out = tmp_path / "moe.safetensors", tmp_path / "dense.safetensors"
    convert(tmp_path / "teacher.safetensors", moe)
    before = moe.read_bytes()
    with pytest.raises(CheckpointError, match="this is the FLUX-MoE that is read; write to another file"):
        unconvert_file(moe, moe)
    assert moe.read_bytes() == before
    assert main(["unconvert", str(tmp_path / "teacher.safetensors"), "--out", str(out)]) == 2
    assert "This is a dense FLUX, not a FLUX-MoE" in capsys.readouterr().err
    quantised = load_file(moe) | {"single_blocks.0.linear1.scale_weight": torch.ones(())}
    save_file(quantised, moe)
    with pytest.raises(CheckpointError, match=r"quantised \(single_blocks\.0\.linear1\.scale_weight\)"):
        unconvert_file(moe, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe.safetensors", "teacher.safetensors"]


def test_a_plan_that_is_not_what_the_file_says_is_an_error(tmp_path: Path) -> None:
    save_flux(tmp_path / "teacher.safetensors")
    target = tmp_path / "moe.safetensors"
    config = convert(tmp_path / "teacher.safetensors", target)
    target.unlink()

    def plan(ffn: str, weights: FFNWeights, **changes: torch.Tensor) -> FFNPlan:
        order_N = torch.arange(512, dtype=torch.int32)
        return replace(FFNPlan(order_N=order_N, router={WEIGHT: torch.ones(12, 128)}), **changes)

    with open_teacher(tmp_path / "teacher.safetensors") as teacher:
        with pytest.raises(ValueError, match="expert_mean_EH is missing; announced otherwise"):
            convert_file(teacher, target, config, plan, expert_mean=True)
        with pytest.raises(ValueError, match=r"router has router\.weight; announced router\.weight, router\.bias"):
            convert_file(teacher, target, config, plan, router_bias=True)
        with pytest.raises(ValueError, match=r"refit; expected the teacher's weights, since split_only is true"):
            convert_file(teacher, target, config, lambda *given: plan(*given, down_bias_H=torch.ones(128)))
        with pytest.raises(ValueError, match=r"split_only is true; expected false with compressed modulations"):
            convert_file(teacher, target, replace(config, adaln_rank=RANK), plan, modulations=Projection())
        with pytest.raises(ValueError, match="adaln_rank is 11; expected it with `modulations`"):
            convert_file(teacher, target, replace(config, adaln_rank=RANK), plan)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]

"""Conversions by trainer and command: presets, capacity routers, and the baselines of Tables 2 and 3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model.checkpoint import check_file
from d2m_model.config import BlockGroup, FluxMoEConfig
from d2m_model.conversion.depth_pruning import output_blocks
from d2m_model.conversion.options import Baseline, FFNKind
from d2m_model.conversion.unconvert import unconvert_file, why_not_the_teacher
from d2m_model.routers import CapacityRouter, capacity_fit
from d2m_model.stand_ins import streams_of
from d2m_train import UserError
from d2m_train.conversion.run import run_conversion
from d2m_train.conversion.settings import ConversionSettings, settings_from_run
from d2m_train.data.batch import Batch
from d2m_train.data.latents import LatentFile
from tests.toys.teachers import DIMS, METADATA, dense_flux

pytest.importorskip("diffusers")

from d2m_model.conversion.ffn import Recipe
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer
from d2m_train.run_file import load_run

DEEP = replace(DIMS, double_blocks=4, single_blocks=6)  # just room for the groups of XS: one of each kind
BLIND = Recipe(experts="dealt", router="centroid", mean=False, refit=False, top_k=2, seed=0)
SEEING = Recipe(experts="dealt", router="ridge", mean=True, refit=False, top_k=2, seed=0)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, data, and one calibration for all tests."""
    folder = tmp_path_factory.mktemp("conversions")
    tensors = dense_flux(DEEP, torch.float32)
    for name in tensors:  # as in a trained FLUX, no block undoes what came before it; two change much
        if name.endswith(("attn.proj.weight", "mlp.2.weight", "linear2.weight")):
            planted = name.startswith(("double_blocks.2.", "single_blocks.3."))
            tensors[name] *= 1.5 if planted else 0.3
    save_file(tensors, folder / "teacher.safetensors", metadata=METADATA)
    generator = torch.Generator().manual_seed(0)
    data = {
        "latents": torch.randn(8, 16, 4, 4, generator=generator),
        "context": torch.randn(8, 3, 32, generator=generator),
        "pooled": torch.randn(8, 48, generator=generator),
    }
    save_file(data, folder / "data.safetensors")
    return folder


def settings(room: Path, out: Path, **changes: object) -> ConversionSettings:
    given = ConversionSettings(
        teacher=room / "teacher.safetensors",
        out=out,
        preset="XS",
        groups="preset",
        active=1,
        selection="topk",
        block_router="ridge",
        stand_ins=False,
        ffns="moe",
        baseline="none",
        router="top_k",
        predictor_width=16,
        recipe=SEEING,
        importance="taylor",
        adaln_rank="preset",
        batches=4,
        batch_size=4,
        tokens=256,
        folder=room / "calibration",
    )
    return replace(given, **changes)  # type: ignore[arg-type]


def made(room: Path, out: Path, **changes: object) -> tuple[FluxMoEConfig, dict, list[str]]:
    """Configuration as read from the file, the JSON report, and what was said."""
    said: list[str] = []
    config = run_conversion(settings(room, out, **changes), LatentFile(room / "data.safetensors"), report=said.append)
    assert check_file(out) == config
    return config, json.loads(out.with_name(f"{out.name}.report.json").read_text()), said


def answer(model: torch.nn.Module) -> torch.Tensor:
    """The velocity of two fixed samples."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        found: torch.Tensor = model(
            hidden_states=torch.randn(2, 4, 64, generator=generator),
            encoder_hidden_states=torch.randn(2, 3, 32, generator=generator),
            pooled_projections=torch.randn(2, 48, generator=generator),
            timestep=torch.tensor([0.2, 0.7]),
            guidance=torch.tensor([2.0, 3.0]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]
    return found


# Groups


def test_a_preset_gets_block_routers_that_know_which_blocks_matter(room: Path, tmp_path: Path) -> None:
    config, report, said = made(room, tmp_path / "xs.safetensors")
    assert [(group.kind, group.blocks, group.active) for group in config.groups] == [("double", 3, 1), ("single", 5, 1)]
    assert (config.provenance["groups"], config.provenance["block_router"]) == ("preset", "ridge")
    assert sorted(report["blocks"]) == sorted(
        [f"double_blocks.{i}" for i in range(4)] + [f"single_blocks.{i}" for i in range(6)]
    )
    assert all(block["mse"] > 0 for block in report["blocks"].values())
    for group in report["groups"].values():
        assert group["ridge"]["agreement"] == 1  # the planted blocks
        assert group["random"]["agreement"] < 1
        assert group["oracle"]["skipped"] == group["ridge"]["skipped"] < group["random"]["skipped"]
    assert any("as the oracle" in line for line in said)
    model = FluxMoETransformer2DModel.from_flux_moe(tmp_path / "xs.safetensors", torch.float32)
    assert answer(model).isfinite().all()


def test_skipped_blocks_get_stand_ins_that_are_reported(room: Path, tmp_path: Path) -> None:
    config, report, said = made(room, tmp_path / "xs.safetensors", stand_ins=True)
    assert config.stand_in_rank == config.dims.hidden_size // 4
    streams = {f"{block.name}.{s}" for group in config.groups for block in group.members for s in streams_of(block)}
    assert report["stand_ins"].keys() == streams
    assert any("stand-ins of skipped blocks" in line for line in said)
    model = FluxMoETransformer2DModel.from_flux_moe(tmp_path / "xs.safetensors", torch.float32)
    assert answer(model).isfinite().all()


def test_block_changes_are_those_of_the_teacher(room: Path, tmp_path: Path) -> None:
    """Asked again, at the noise levels and with the noise of the calibration."""
    from d2m_train.conversion.calibrate import BatchRecorder, CalibrationBatches

    _, report, _ = made(room, tmp_path / "m.safetensors", preset="M")
    model = load_transformer(room / "teacher.safetensors", torch.float32)
    seen: list[tuple[torch.Tensor, ...]] = []

    def hook(_: object, __: object, given: dict, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        text, image = found[0] - given["encoder_hidden_states"], found[1] - given["hidden_states"]
        seen.append((torch.cat([text, image], 1).detach(), image.detach()))

    model.single_transformer_blocks[2].register_forward_hook(hook, with_kwargs=True)
    asked = CalibrationBatches(batches=4, batch_size=4, tokens=8, taylor=False, seed=0)
    recorder, data = BatchRecorder(model, DEEP, ["single_blocks.0"], asked), LatentFile(room / "data.safetensors")
    for index in range(4):
        recorder.record(index, data.batch(index, 4, 0))
    both, image = (torch.cat([pair[i].square().flatten() for pair in seen]).mean() for i in (0, 1))
    found = report["blocks"]["single_blocks.2"]
    assert (found["mse"], found["image_mse"]) == pytest.approx((float(both), float(image)), rel=1e-4)


def test_groups_are_placed_where_blocks_change_least_or_as_they_are_listed(room: Path, tmp_path: Path) -> None:
    config, report, _ = made(room, tmp_path / "auto.safetensors", groups="auto", preset="S", active=2)
    (single,) = [group for group in config.groups if group.kind == "single"]
    image_mse = [report["blocks"][f"single_blocks.{i}"]["image_mse"] for i in range(6)]
    out = {0: 5, 1: 0}[single.first]
    assert image_mse[out] == max(image_mse[0], image_mse[5])
    assert (single.active, config.provenance["groups"]) == (2, "auto")
    listed = ("double:1-2/1", "single:2-5")
    config, _, _ = made(room, tmp_path / "listed.safetensors", groups=listed, preset="L", active=3, selection="window")
    assert config.groups == (
        BlockGroup(kind="double", first=1, blocks=2, active=1, selection="window"),
        BlockGroup(kind="single", first=2, blocks=4, active=3, selection="window"),
    )
    assert config.provenance["groups"] == list(listed)


def test_without_data_block_routers_are_random_and_it_is_said(room: Path, tmp_path: Path) -> None:
    blind = settings(
        room, tmp_path / "m.safetensors", recipe=BLIND, importance="weight-norm", block_router="random", preset="M"
    )
    said: list[str] = []
    run_conversion(blind, report=said.append)
    tensors = load_file(blind.out)
    assert any("Block routers are random" in line for line in said)
    router = tensors["block_groups.0.router_x.weight"]
    assert router.shape == (3, 128)
    assert len(router.unique()) == router.numel()
    for changes, what in (
        ({"groups": "auto"}, "groups auto"),
        ({"block_router": "ridge"}, "block_router ridge"),
        ({"router": "capacity"}, "router_kind capacity"),
        ({"baseline": "depth_pruning"}, "baseline depth_pruning"),
        ({"recipe": replace(SEEING, experts="coactivation")}, "experts coactivation, router ridge, mean"),
    ):
        with pytest.raises(UserError, match=f"has to run the teacher.*{what}.*give data"):
            run_conversion(replace(blind, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["M", "S", "XS"])
def test_a_split_only_preset_gives_its_teacher_back_bit_for_bit(room: Path, tmp_path: Path, preset: str) -> None:
    out = tmp_path / "moe.safetensors"
    config, _, _ = made(room, out, preset=preset, adaln_rank=None)
    assert config.split_only
    unconvert_file(out, tmp_path / "dense.safetensors")
    dense, teacher = load_file(tmp_path / "dense.safetensors"), load_file(room / "teacher.safetensors")
    assert dense.keys() == teacher.keys()
    assert all(torch.equal(dense[name], teacher[name]) for name in teacher)


# DiffMoE


def test_a_capacity_router_works_without_training(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_fit, "STEPS", 100)
    config, report, said = made(room, tmp_path / "capacity.safetensors", preset="L", router="capacity")
    assert config.router == CapacityRouter(capacity=2.0, width=16)
    assert config.gate.mode == "sum"
    assert any("capacity predictors agree" in line for line in said)
    agrees = [ffn["agrees"] for ffn in report["ffns"].values()]
    assert sum(agrees) / len(agrees) > 2 * 2 / 12  # twice chance, though a fit had 192 tokens
    model = FluxMoETransformer2DModel.from_flux_moe(tmp_path / "capacity.safetensors", torch.float32)
    assert answer(model).isfinite().all()
    moe = model.moe_ffns()["single_blocks.3"]
    tensors = load_file(tmp_path / "capacity.safetensors")
    assert torch.equal(moe.get_buffer("capacity.threshold"), tensors["single_blocks.3.threshold"])


# Baselines


def test_mlp_pruning_keeps_what_top_k_experts_would_activate_and_runs_nothing_else(room: Path, tmp_path: Path) -> None:
    moe, pruned = tmp_path / "moe.safetensors", tmp_path / "pruned.safetensors"
    made(room, moe, preset="L")
    config, report, _ = made(room, pruned, preset="L", baseline="mlp_pruning")
    layout = config.ffns["single_blocks.0"]
    assert (layout.shared, layout.experts, layout.width, config.top_k) == (128 + 2 * 32, 10, 32, 0)
    tensors, split = load_file(pruned), load_file(moe)
    assert not any(name.endswith("expert_mean") for name in tensors)
    for ffn in config.ffns:  # the most important neurons, of which the shared expert of a MoE has the first
        shared, first = (file[f"{ffn}.neuron_order"][:128].tolist() for file in (tensors, split))
        assert shared == first
    teacher, order = (
        load_file(room / "teacher.safetensors"),
        tensors["double_blocks.2.img_mlp.neuron_order"][:192].long(),
    )
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    up, bias = (teacher[f"double_blocks.2.img_mlp.0.{kind}"][order] for kind in ("weight", "bias"))
    hidden = torch.nn.functional.gelu(x @ up.T + bias, approximate="tanh")
    expected = (
        hidden @ teacher["double_blocks.2.img_mlp.2.weight"][:, order].T + teacher["double_blocks.2.img_mlp.2.bias"]
    )
    ffn = FluxMoETransformer2DModel.from_flux_moe(pruned, torch.float32).moe_ffns()["double_blocks.2.img_mlp"]
    torch.testing.assert_close(ffn(x).detach(), expected)
    assert report["ffns"]["single_blocks.0"]["converted"] > 0


@pytest.mark.parametrize("ffns", ["moe", "dense"])
def test_depth_pruning_is_the_teacher_without_the_blocks_that_change_least(
    room: Path, tmp_path: Path, ffns: FFNKind
) -> None:
    out = tmp_path / "shallow.safetensors"
    folder = room / "calibration" if ffns == "moe" else None  # without experts less is asked
    config, report, said = made(room, out, baseline="depth_pruning", ffns=ffns, adaln_rank=None, folder=folder)
    change = {name: block["image_mse"] for name, block in report["blocks"].items()}
    kept = config.provenance["teacher_blocks"]
    assert (config.dims.double_blocks, config.dims.single_blocks, config.groups) == (2, 2, ())
    assert max(change, key=change.__getitem__) in ("double_blocks.2", "single_blocks.3")
    assert kept == {"double": [0, 2], "single": [3, 5]}
    assert config.provenance["teacher_outputs"] == {"double": [0, 3], "single": [4, 5]}, "of the groups' last blocks"
    assert any("double blocks are the teacher's 0," in line for line in said)
    assert not config.split_only
    why = why_not_the_teacher(config)
    assert why is not None
    assert "depth pruning" in why
    tensors, teacher = load_file(out), load_file(room / "teacher.safetensors")
    for name, source in (
        ("double_blocks.1.txt_attn.proj.weight", "double_blocks.2.txt_attn.proj.weight"),
        ("single_blocks.1.modulation.lin.bias", "single_blocks.5.modulation.lin.bias"),
        ("img_in.weight", "img_in.weight"),
    ):
        assert torch.equal(tensors[name], teacher[source])
    # With all experts it is the teacher whose other blocks do nothing.
    dense = load_transformer(room / "teacher.safetensors", torch.float32)
    dense.transformer_blocks = torch.nn.ModuleList(dense.transformer_blocks[i] for i in kept["double"])
    dense.single_transformer_blocks = torch.nn.ModuleList(dense.single_transformer_blocks[i] for i in kept["single"])
    model = FluxMoETransformer2DModel.from_flux_moe(out, torch.float32)
    assert bool(config.ffns) == (ffns == "moe")
    model.set_top_k(12)
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-4)


def test_of_several_kept_blocks_of_a_group_each_stands_for_those_up_to_the_next() -> None:
    group = BlockGroup(kind="single", first=2, blocks=5, active=2, selection="topk")
    assert output_blocks((group,), {"double": [0, 1], "single": [0, 1, 3, 5, 7]}) == {
        "double": [0, 1],
        "single": [0, 1, 4, 6, 7],
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"baseline": "depth_pruning", "preset": "L"}, "L has none; take M, S or XS"),
        ({"groups": "auto", "preset": "L"}, "L has none"),
        ({"baseline": "mlp_pruning", "router": "capacity"}, "leave out either it or a capacity router"),
        ({"baseline": "mlp_pruning", "ffns": "dense"}, "leave out either it or dense FFNs"),
        ({"ffns": "dense", "router": "capacity"}, "A capacity router needs experts"),
        ({"baseline": "mlp_pruning", "recipe": replace(SEEING, top_k=12)}, "expected 1 to 11"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_done(
    room: Path, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        run_conversion(
            settings(room, tmp_path / "x.safetensors", folder=tmp_path / "calibration", **changes),
            LatentFile(room / "data.safetensors"),
        )
    assert not list(tmp_path.iterdir())


# A run's first stage


def test_a_runs_first_stage_is_the_conversion_that_its_file_says(room: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "output_dir: x\nteacher: {path: t}\ndata: {source: emoji}\nseed: 3\n"
        "student: {preset: S, groups: [double:1-3/2], router: capacity, predictor_width: 16, adaln_rank: none, top_k: 3}\n"
        "convert: {batches: 4, batch_size: 4, tokens: 256, refit: false, experts: random, block_router: random}\n"
    )
    run = load_run(tmp_path / "run.yaml")
    found = settings_from_run(run, room / "teacher.safetensors", tmp_path / "out", tmp_path / "calibration")
    assert found == settings(
        room,
        tmp_path / "out",
        preset="S",
        groups=("double:1-3/2",),
        router="capacity",
        adaln_rank=None,
        block_router="random",
        folder=tmp_path / "calibration",
        recipe=Recipe(experts="random", router="ridge", mean=True, refit=False, top_k=3, seed=3),
    )
    baseline: Baseline = "mlp_pruning"
    assert settings_from_run(
        load_run(tmp_path / "run.yaml", [f"student.baseline={baseline}", "student.groups=auto"]),
        room, tmp_path, None,
    ).groups == "auto"  # fmt: skip


def test_prompts_alone_calibrate_on_the_teachers_own_images(room: Path, tmp_path: Path) -> None:
    class Prompts(LatentFile):
        def batch(self, index: int, size: int, seed: int) -> Batch:
            return replace(super().batch(index, size, seed), tokens_BTC=None)

    asked = settings(room, tmp_path / "p.safetensors", folder=None, preset="L", batches=2, adaln_rank=None)
    config = run_conversion(asked, Prompts(room / "data.safetensors"), report=[].append)
    assert check_file(asked.out) == config
    assert not list(tmp_path.glob("*.calibration")), "left behind"

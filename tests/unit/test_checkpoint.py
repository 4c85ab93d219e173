"""A wrong file is refused with what is wrong; a missing tensor is an error (promise 3 of the file format)."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2m_model.checkpoint import (
    CheckpointError,
    check_dense,
    check_file,
    check_moe,
    check_state_dict,
    config_tensor,
    dims_of,
    expected_tensors,
    optional_tensors,
    parse_config,
)
from d2m_model.config import (
    BlockGroup,
    FFNLayout,
    FluxMoEConfig,
    Gate,
    Teacher,
    all_ffn_names,
    preset_layouts,
)
from d2m_model.keys import dense_shapes
from d2m_model.routers import CapacityRouter
from tests.toys.teachers import DIMS, dense_flux

CONFIG = FluxMoEConfig(
    dims=DIMS,
    ffns=preset_layouts(DIMS),
    groups=(),
    gate=Gate(mode="sum", scale=1.0),
    top_k=2,
    adaln_rank=None,
    split_only=True,
    teacher=Teacher(title="Small FLUX", sha256="0" * 64, licence="Apache-2.0"),
)
FFN = "single_blocks.1"


@pytest.fixture
def moe() -> dict[str, torch.Tensor]:
    tensors = dense_flux()
    for name, layout in CONFIG.ffns.items():
        tensors[f"{name}.router.weight"] = torch.randn(layout.experts, DIMS.hidden_size)
        tensors[f"{name}.neuron_order"] = torch.randperm(layout.neurons, dtype=torch.int32)
    tensors["d2m_config"] = config_tensor(CONFIG)
    return tensors


def test_dimensions_are_read_off_the_weights() -> None:
    assert dims_of(dense_shapes(DIMS)) == DIMS
    schnell = dataclasses.replace(DIMS, guidance_embed=False, in_channels=384, hidden_size=256)
    assert dims_of(dense_shapes(schnell)) == schnell


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",), "looks like a LoRA"),
        (
            ("transformer_blocks.0.norm1.linear.weight", "single_transformer_blocks.0.proj_mlp.weight"),
            "diffusers' key names",
        ),
        (("input_blocks.0.0.weight", "out.2.weight"), "Stable Diffusion UNet"),
        (("joint_blocks.0.x_block.attn.qkv.weight",), "Stable Diffusion 3"),
        (("decoder.conv_in.weight", "encoder.conv_in.weight"), r"autoencoder \(VAE\)"),
        (("text_model.encoder.layers.0.mlp.fc1.weight",), "a text encoder"),
        (("distilled_guidance_layer.norms.0.scale",), "Chroma"),
        (("x",), "it has no img_in.weight"),
    ],
)
def test_another_model_is_refused_by_what_it_looks_like(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"not a FLUX.1 transformer: .*{message}"):
        dims_of(dict.fromkeys(keys, (1, 1)))


def test_flux_2_is_not_taken_for_flux_1() -> None:
    shapes = dense_shapes(DIMS) | {"double_stream_modulation_img.lin.weight": (768, 128)}
    with pytest.raises(CheckpointError, match=r"This is FLUX\.2, not FLUX\.1"):
        dims_of(shapes)


def test_a_whole_flux_moe_is_accepted_under_any_prefix_and_norm_spelling(moe: dict[str, torch.Tensor]) -> None:
    assert check_state_dict(moe) == CONFIG
    assert check_state_dict({f"model.diffusion_model.{name}": tensor for name, tensor in moe.items()}) == CONFIG
    assert check_state_dict({name.replace("_norm.scale", "_norm.weight"): t for name, t in moe.items()}) == CONFIG


def test_optional_tensors_may_be_there_with_the_right_shape_only(moe: dict[str, torch.Tensor]) -> None:
    moe |= {name: torch.zeros(shape) for name, shape in optional_tensors(CONFIG).items()}
    assert check_state_dict(moe) == CONFIG
    moe[f"{FFN}.expert_mean"] = torch.zeros(12, 64)
    with pytest.raises(CheckpointError, match=r"expert_mean has shape \[12, 64\]; expected \[12, 128\]"):
        check_state_dict(moe)


def test_leaving_out_any_tensor_is_an_error_that_names_it(moe: dict[str, torch.Tensor]) -> None:
    assert set(expected_tensors(CONFIG)) == set(moe) - {"d2m_config"}
    shapes = {name: tuple(tensor.shape) for name, tensor in moe.items()}
    dtypes = {name: tensor.dtype for name, tensor in moe.items()}
    for name, shape in expected_tensors(CONFIG).items():
        without = {other: found for other, found in shapes.items() if other != name}
        with pytest.raises(CheckpointError) as caught:
            check_moe(without, dtypes, CONFIG)
        assert f"FLUX-MoE schema 1: {name} is missing (expected shape {list(shape)})" in str(caught.value)


def test_misshapen_surplus_and_mistyped_tensors_are_named(moe: dict[str, torch.Tensor]) -> None:
    def message(**changes: torch.Tensor) -> str:
        changed = moe | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        with pytest.raises(CheckpointError) as caught:
            check_state_dict(changed, "model.safetensors")
        return str(caught.value)

    assert (
        message(**{f"{FFN}.router.weight": torch.zeros(11, 128)})
        == f"model.safetensors: This is not FLUX-MoE schema 1: {FFN}.router.weight has shape [11, 128]; expected [12, 128]."
    )
    assert "single_blocks.2.linear1.weight [896, 128] does not belong" in message(
        **{"single_blocks.2.linear1.weight": torch.zeros(896, 128)}
    )
    assert "double_blocks.0.img_mlp.router.weight [12, 128] does not belong" in message(
        **{"double_blocks.0.img_mlp.router.weight": torch.zeros(12, 128)}
    )
    assert "neuron_order is torch.int64; expected torch.int32" in message(**{f"{FFN}.neuron_order": torch.arange(512)})
    assert "linear1.weight is torch.int8; expected a floating-point type" in message(
        **{f"{FFN}.linear1.weight": torch.zeros(896, 128, dtype=torch.int8)}
    )
    twice = message(img_in__bias=torch.zeros(1), txt_in__bias=torch.zeros(1))
    assert "img_in.bias has shape [1]; expected [128]. (1 more such problems.)" in twice


def test_weights_that_comfyui_quantised_are_left_to_it(moe: dict[str, torch.Tensor]) -> None:
    moe[f"{FFN}.linear1.weight"] = torch.zeros(896, 64, dtype=torch.uint8)
    moe[f"{FFN}.linear1.weight_scale"] = torch.ones(1)
    for text, readable in ((b'{"format": "nvfp4"}', True), (b"{}", False), (b'{"format": 5}', False), (b"[", False)):
        moe[f"{FFN}.linear1.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        with nullcontext() if readable else pytest.raises(CheckpointError, match=r"linear1\.comfy_quant, the descr"):
            assert check_state_dict(moe) == CONFIG


def test_a_neuron_order_that_is_no_permutation_is_refused(moe: dict[str, torch.Tensor]) -> None:
    moe[f"{FFN}.neuron_order"][3] = moe[f"{FFN}.neuron_order"][4]
    with pytest.raises(CheckpointError, match=rf"{FFN}\.neuron_order is not a permutation of 0 to 511"):
        check_state_dict(moe)


@pytest.mark.parametrize(
    "name", [f"{FFN}.router.weight", f"{FFN}.router.bias", f"{FFN}.expert_mean", "adaln_in.weight"]
)
def test_nan_in_what_the_conversion_adds_is_refused(moe: dict[str, torch.Tensor], name: str) -> None:
    config = dataclasses.replace(CONFIG, adaln_rank=8)
    for key, shape in {**expected_tensors(config), **optional_tensors(config)}.items():
        if moe.get(key, torch.tensor(0)).shape != shape:
            moe[key] = torch.zeros(shape)
    moe["d2m_config"] = config_tensor(config)
    check_state_dict(moe)
    moe[name].view(-1)[-1] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has NaN"):
        check_state_dict(moe)


@pytest.mark.parametrize("block", ["single_blocks.50000000", "single_blocks.1000", f"double_blocks.{'9' * 5000}"])
def test_a_block_number_beyond_the_files_tensors_is_refused_at_once(block: str) -> None:
    shapes = dense_shapes(DIMS) | {f"{block}.x": (1,)}
    with pytest.raises(CheckpointError, match=rf"it has {block[:34]}.*; expected block numbers below {len(shapes)}"):
        dims_of(shapes)


def test_a_configuration_of_more_blocks_than_tensors_is_refused(moe: dict[str, torch.Tensor]) -> None:
    config = dataclasses.replace(CONFIG, dims=DIMS.with_depths(double=DIMS.double_blocks, single=900))
    with pytest.raises(CheckpointError, match=r"d2m_config states 900 single blocks; this file has \d+ tensors"):
        check_state_dict(moe | {"d2m_config": config_tensor(config)})


def test_a_norm_in_two_spellings_is_refused(moe: dict[str, torch.Tensor]) -> None:
    moe["single_blocks.0.norm.query_norm.weight"] = torch.zeros_like(moe["single_blocks.0.norm.query_norm.scale"])
    with pytest.raises(CheckpointError, match="a norm's scale in two spellings"):
        check_state_dict(moe)


@pytest.fixture
def capacity(moe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`moe` with capacity routers and a group of blocks."""
    config = dataclasses.replace(
        CONFIG,
        router=CapacityRouter(capacity=2, width=8),
        groups=(BlockGroup(kind="single", first=0, blocks=2, active=1, selection="topk"),),
    )
    for name, shape in expected_tensors(config).items():
        moe.setdefault(name, torch.full(shape, 0.5))
    return moe | {"d2m_config": config_tensor(config)}


def test_a_capacity_router_brings_its_tensors_and_they_are_checked_whole(capacity: dict[str, torch.Tensor]) -> None:
    config = check_state_dict(capacity)
    assert config.router == CapacityRouter(capacity=2, width=8)
    parts = {name.removeprefix(f"{FFN}."): tuple(capacity[name].shape) for name in capacity if name.startswith(FFN)}
    assert {name: shape for name, shape in parts.items() if name.startswith(("capacity", "threshold"))} == {
        "capacity.in_layer.weight": (8, 128),
        "capacity.in_layer.bias": (8,),
        "capacity.out_layer.weight": (12, 8),
        "capacity.out_layer.bias": (12,),
        "capacity.scale": (1,),
        "threshold": (12,),
    }
    for name in expected_tensors(config):
        if ".capacity." in name or name.endswith("threshold"):
            with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is missing"):
                check_state_dict({other: tensor for other, tensor in capacity.items() if other != name})
    without = {name: tensor for name, tensor in capacity.items() if not name.startswith("block_groups.")}
    top_k = without | {"d2m_config": config_tensor(CONFIG)}
    with pytest.raises(CheckpointError, match=r"img_mlp\.capacity\.\S+ \[\S+.* does not belong to it"):
        check_state_dict(top_k)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{FFN}.capacity.in_layer.weight", float("nan"), "has NaN or infinite"),
        (f"{FFN}.capacity.in_layer.bias", float("inf"), "has NaN or infinite"),
        (f"{FFN}.capacity.out_layer.weight", float("nan"), "has NaN or infinite"),
        (f"{FFN}.capacity.out_layer.bias", float("nan"), "has NaN or infinite"),
        (f"{FFN}.threshold", float("nan"), "has NaN or infinite"),
        (f"{FFN}.threshold", 1.25, r"is 0\.5 to 1\.25; expected probabilities"),
        (f"{FFN}.threshold", -0.5, r"is -0\.5 to 0\.5; expected probabilities"),
        (f"{FFN}.capacity.scale", float("inf"), "has NaN or infinite"),
        (f"{FFN}.capacity.scale", 0.0, "is 0; expected a positive number"),
        ("block_groups.0.router_x.weight", float("nan"), "has NaN or infinite"),
        ("block_groups.0.router_y.weight", float("nan"), "has NaN or infinite"),
    ],
)
def test_routers_with_values_that_cannot_be_are_refused_by_name(
    capacity: dict[str, torch.Tensor], name: str, value: float, message: str
) -> None:
    capacity[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} {message}"):
        check_state_dict(capacity)


def test_a_dense_flux_where_a_moe_is_expected_is_told_how_to_convert() -> None:
    with pytest.raises(
        CheckpointError, match=r"flux\.safetensors: This is a dense FLUX, .*python -m d2m_train convert --teacher"
    ):
        check_state_dict(dense_flux(), "flux.safetensors")


def test_a_newer_schema_and_a_damaged_configuration_are_refused(moe: dict[str, torch.Tensor]) -> None:
    def with_config(text: str) -> dict[str, torch.Tensor]:
        return moe | {"d2m_config": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}

    newer = json.loads(CONFIG.to_json()) | {"schema_version": 2, "something": "new"}
    with pytest.raises(CheckpointError, match=r"FLUX-MoE schema 2; this version reads up to 1\. Update"):
        check_state_dict(with_config(json.dumps(newer)))
    with pytest.raises(CheckpointError, match="d2m_config is not JSON"):
        check_state_dict(with_config(CONFIG.to_json()[:-5]))
    with pytest.raises(CheckpointError, match=r"d2m_config is torch\.float16"):
        check_state_dict(moe | {"d2m_config": moe["d2m_config"].half()})


def test_the_configuration_survives_the_tensor() -> None:
    assert parse_config(config_tensor(CONFIG)) == CONFIG


def test_groups_and_adaln_compression_bring_their_tensors() -> None:
    groups = (BlockGroup(kind="single", first=0, blocks=2, active=1, selection="topk"),)
    expected = expected_tensors(dataclasses.replace(CONFIG, adaln_rank=11, groups=groups))
    assert expected["adaln_in.weight"] == (11, 128)
    assert expected["double_blocks.0.img_mod.lin.weight"] == (768, 11)
    assert expected["double_blocks.1.txt_mod.lin.bias"] == (768,)
    assert expected["single_blocks.1.modulation.lin.weight"] == (384, 11)
    assert expected["final_layer.adaLN_modulation.1.weight"] == (256, 128)
    assert expected["block_groups.0.router_x.weight"] == expected["block_groups.0.router_y.weight"] == (2, 128)


def test_layouts_differ_by_ffn() -> None:
    ffns = {name: FFNLayout(shared=256, experts=4, width=64) for name in all_ffn_names(DIMS)[:1]}
    expected = expected_tensors(dataclasses.replace(CONFIG, ffns=ffns))
    assert expected["double_blocks.0.img_mlp.router.weight"] == (4, 128)
    assert "single_blocks.0.neuron_order" not in expected


def test_teachers_are_dense_whole_and_not_quantised(moe: dict[str, torch.Tensor]) -> None:
    def dense(tensors: dict[str, torch.Tensor]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_dense(shapes, {name: tensor.dtype for name, tensor in tensors.items()})

    flux = dense_flux()
    dense(flux)
    with pytest.raises(CheckpointError, match="a FLUX-MoE already"):
        dense(moe)
    with pytest.raises(CheckpointError, match=r"quantised \(double_blocks\.0\.img_mlp\.0\.scale_weight\)"):
        dense(flux | {"double_blocks.0.img_mlp.0.scale_weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"single_blocks\.1\.\S+ is missing .* \(6 more such"):
        dense(
            {name: tensor for name, tensor in flux.items() if not re.match(r"single_blocks\.1\.(?!linear1.bias)", name)}
        )
    with pytest.raises(CheckpointError, match=r"single_blocks\.0 missing, though .* is single_blocks\.1\."):
        dense({name: tensor for name, tensor in flux.items() if not name.startswith("single_blocks.0.")})


def test_a_truncated_file_is_refused_and_a_whole_one_read(moe: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "moe.safetensors"
    save_file(moe, path)
    assert check_file(path) == CONFIG
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        check_file(path)

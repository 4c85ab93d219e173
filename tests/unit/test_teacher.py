"""Teachers in the forms in which they are published: all give the same weights; what cannot be read is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2m_model.config import FluxDims
from d2m_model.keys import dense_shapes
from d2m_model.teacher import open_teacher
from d2m_model.tensor_file import CheckpointError
from d2m_train.teacher.known_flux import FLUX_DEV
from tests.toys.teachers import DIMS, METADATA, dense_flux, diffusers_tensors

Tensors = dict[str, torch.Tensor]
PREFIX = "model.diffusion_model."
LINEAR = "single_blocks.0.linear1.weight"


def contiguous(tensors: Tensors) -> Tensors:
    """Copies, since safetensors writes neither views of one storage nor strided tensors."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def save(path: Path, tensors: Tensors, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(contiguous(tensors), path, metadata=METADATA | metadata)
    return path


def save_shards(folder: Path, tensors: Tensors, name: str, shards: int = 3) -> Path:
    """Shards and their index, as diffusers and transformers write them; the index."""
    weight_map = {}
    for shard in range(shards):
        file = f"{name}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for i, key in enumerate(sorted(tensors)) if i * shards // len(tensors) == shard}
        save(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def assert_same(path: Path, expected: Tensors) -> None:
    with open_teacher(path) as teacher:
        assert set(teacher.shapes) == set(expected)
        for name, tensor in expected.items():
            found = teacher.tensor(name)
            assert (found.dtype, tuple(found.shape)) == (teacher.dtypes[name], teacher.shapes[name]), name
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name


# Names, files, folders


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bfl_keys_alone_and_in_a_full_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    flux = dense_flux(dtype=dtype)
    assert_same(save(tmp_path / "flux.safetensors", flux), flux)
    whole = {PREFIX + name: tensor for name, tensor in flux.items()}
    beside = {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.t5xxl.shared.weight": torch.ones(3)}
    assert_same(save(tmp_path / "checkpoint.safetensors", whole | beside), flux)


def test_norms_in_comfyuis_spelling(tmp_path: Path) -> None:
    flux = dense_flux()
    spelt = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in flux.items()}
    assert_same(save(tmp_path / "flux.safetensors", spelt), flux)


def test_diffusers_keys_in_one_file(tmp_path: Path) -> None:
    flux = dense_flux()
    path = save(tmp_path / "diffusion_pytorch_model.safetensors", diffusers_tensors(flux, DIMS))
    assert_same(path, flux)
    with open_teacher(path) as teacher:
        assert any("diffusers" in note for note in teacher.notes)


@pytest.mark.parametrize("naming", ["bfl", "diffusers"])
def test_shards_are_found_by_their_index_by_any_of_them_and_by_their_folder(tmp_path: Path, naming: str) -> None:
    flux = dense_flux()
    tensors = flux if naming == "bfl" else diffusers_tensors(flux, DIMS)
    folder = tmp_path / "FLUX.1-small" / "transformer"
    index = save_shards(folder, tensors, "diffusion_pytorch_model")
    shards = sorted(folder.glob("*.safetensors"))
    for path in (index, shards[1], folder, folder.parent):
        assert_same(path, flux)
        with open_teacher(path) as teacher:
            assert teacher.files == (index, *shards)
            assert teacher.size == sum(file.stat().st_size for file in teacher.files)


def test_a_variant_beside_the_standard_model_is_read_by_its_own_shards(tmp_path: Path) -> None:
    standard, variant = dense_flux(dtype=torch.float32), dense_flux(dtype=torch.float16)
    save(tmp_path / "diffusion_pytorch_model.safetensors", standard)
    save_shards(tmp_path, variant, "diffusion_pytorch_model.fp16")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors.index.json").rename(
        tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"  # diffusers' own spelling
    )
    assert_same(tmp_path, standard)
    assert_same(tmp_path / "diffusion_pytorch_model.fp16-00001-of-00003.safetensors", variant)


def test_missing_shards_indices_and_folders_are_told(tmp_path: Path) -> None:
    index = save_shards(tmp_path / "flux", dense_flux(), "flux1")
    shards = sorted(index.parent.glob("*.safetensors"))
    shards[2].unlink()
    for path in (index, shards[0], index.parent):
        with pytest.raises(CheckpointError, match=r"1 of 3 shards are missing: flux1-00003-of-00003.safetensors"):
            open_teacher(path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"one shard of several.* like flux1\.safetensors\.index\.json"):
        open_teacher(shards[0])
    for name in ("../other.safetensors", "x" * 300):
        index.write_text(json.dumps({"weight_map": {"img_in.weight": name}}))
        with pytest.raises(CheckpointError, match="not the index of a sharded model"):
            open_teacher(index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: there is no \.safetensors in this folder"):
        open_teacher(tmp_path / "empty")
    for name in ("a", "b"):
        save(tmp_path / "two" / f"{name}.safetensors", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"several models\. Give one of them: a\.safetensors, b\.safetensors"):
        open_teacher(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: there is no such file"):
        open_teacher(tmp_path / "none.safetensors")


# float8


def quantise(tensor: torch.Tensor, *, rows: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensors:
    """ComfyUI's: weight / scale in float8. By suffix; the scale is one number or one a row."""
    scale = tensor.float().abs().amax(1, keepdim=True) if rows else tensor.float().abs().max()
    scale = scale / torch.finfo(dtype).max
    return {"weight": (tensor.float() / scale).to(dtype), "scale": scale}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_becomes_bfloat16_of_the_same_values(tmp_path: Path, dtype: torch.dtype) -> None:
    flux = {
        name: tensor.to(dtype) if tensor.ndim == 2 else tensor
        for name, tensor in dense_flux(dtype=torch.float32).items()
    }
    path = save(tmp_path / "flux.safetensors", flux)
    assert_same(path, {name: t.bfloat16() if t.ndim == 2 else t for name, t in flux.items()})
    with open_teacher(path) as teacher:
        assert all(torch.equal(teacher.tensor(name).float(), tensor.float()) for name, tensor in flux.items())
        assert [note for note in teacher.notes if "float8: " in note and "same values" in note]


@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "a scale for each row"])
@pytest.mark.parametrize("form", ["old", "new", "header"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_scaled_float8_in_each_of_comfyuis_forms(tmp_path: Path, form: str, rows: bool, prefix: str) -> None:
    flux, stored, metadata, expected = dense_flux(), {}, {}, {}
    layers = {}
    for name, tensor in flux.items():
        module, _, kind = name.rpartition(".")
        stored[name] = expected[name] = tensor
        if kind != "weight" or not name.startswith(("double_blocks", "single_blocks")):
            continue
        quantised = quantise(tensor, rows=rows)
        stored[name] = quantised["weight"]
        expected[name] = (quantised["weight"].float() * quantised["scale"]).bfloat16()
        if form == "old":
            stored |= {f"{module}.scale_weight": quantised["scale"], f"{module}.scale_input": torch.ones(())}
        else:
            stored |= {f"{module}.weight_scale": quantised["scale"], f"{module}.input_scale": torch.ones(())}
            layers[prefix + module] = about = {"format": "float8_e4m3fn"}
            if form == "new":
                stored[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    if form == "old":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if form == "header":
        layers[f"text_encoders.{LINEAR}"] = {"format": "nvfp4"}  # of no concern
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    path = save(tmp_path / "flux.safetensors", {prefix + name: tensor for name, tensor in stored.items()}, **metadata)
    assert_same(path, expected)
    with open_teacher(path) as teacher:
        assert teacher.notes == ("The teacher is scaled float8: 26 weights are dequantised to bfloat16.",)
        assert (teacher.tensor(LINEAR).float() - flux[LINEAR].float()).norm() < 0.04 * flux[LINEAR].float().norm()


def test_scaled_float8_in_diffusers_names_is_dequantised_before_it_is_fused(tmp_path: Path) -> None:
    flux = dense_flux()
    theirs = diffusers_tensors(flux, DIMS)
    q = "single_transformer_blocks.0.attn.to_q"
    quantised = quantise(theirs[f"{q}.weight"], rows=False)
    expected = flux[LINEAR].clone()
    expected[:128] = (quantised["weight"].float() * quantised["scale"]).bfloat16()
    theirs |= {f"{q}.weight": quantised["weight"], f"{q}.weight_scale": quantised["scale"]}
    with open_teacher(save(tmp_path / "flux.safetensors", theirs)) as teacher:
        assert torch.equal(teacher.tensor(LINEAR), expected)


def comfy_quant(form: str) -> Tensors:
    about = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    return {f"{LINEAR.removesuffix('weight')}comfy_quant": about}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LINEAR: torch.zeros(896 * 64, 1, dtype=torch.uint8), f"{LINEAR}.absmax": torch.ones(4)}, "bitsandbytes"),
        (
            {f"{LINEAR}.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
            r"bitsandbytes \(nf4, fp4 or int8\), single_blocks\.0\.linear1\.weight\.quant_state",
        ),
        (comfy_quant("nvfp4"), r"nvfp4, single_blocks\.0\.linear1\. Not supported; take the model's bfloat16"),
        (comfy_quant("mxfp8"), "mxfp8"),
        (comfy_quant("int8_tensorwise"), "int8_tensorwise"),
        ({"single_blocks.0.linear1.pre_quant_scale": torch.ones(128)}, "pre_quant_scale"),
        ({"single_blocks.0.linear1.weight_scale_2": torch.ones(())}, "nvfp4"),
        ({"single_blocks.0.linear1.qweight": torch.zeros(4, dtype=torch.int32)}, "GPTQ, AWQ or SVDQuant"),
        (
            {
                LINEAR: torch.zeros(896, 128, dtype=torch.int8),
                "single_blocks.0.linear1.weight_scale": torch.ones(()),
            },
            r"int8, single_blocks\.0\.linear1\.weight with single_blocks\.0\.linear1\.weight_scale",
        ),
        ({LINEAR: torch.zeros(896, 128, dtype=torch.int8)}, "is torch.int8; expected a floating-point type"),
        (
            {
                LINEAR: torch.zeros(896, 128, dtype=torch.float8_e4m3fn),
                "single_blocks.0.linear1.weight_scale": torch.ones(896, 4),
            },
            r"in blocks: scales \[896, 4\] for a weight \[896, 128\]; expected one scale, or one per row",
        ),
    ],
)
def test_other_quantisations_are_refused_by_their_name(tmp_path: Path, changes: Tensors, message: str) -> None:
    path = save(tmp_path / "flux.safetensors", dense_flux() | changes)
    with pytest.raises(CheckpointError, match=rf"flux\.safetensors: .*{message}"):
        open_teacher(path)


def test_gguf_and_pytorch_files_are_refused_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "flux.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    with pytest.raises(CheckpointError, match="not a safetensors file, but a GGUF, which is quantised"):
        open_teacher(tmp_path / "flux.gguf")
    torch.save({"x": torch.ones(1)}, tmp_path / "flux.pt")
    with pytest.raises(CheckpointError, match=r"a zip, as PyTorch writes \.pt"):
        open_teacher(tmp_path / "flux.pt")


# Variants


VARIANTS = {
    "dev, Krea and Kontext": {},
    "schnell": {"guidance_embed": False},
    "Fill": {"in_channels": 384},
    "Depth and Canny": {"in_channels": 128},
    "Lite, 8 of 19 double blocks": {"double_blocks": 1, "single_blocks": 4},
    "mini, 5 and 10 blocks": {"double_blocks": 1, "single_blocks": 3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("naming", ["bfl", "diffusers"])
def test_every_variant_is_known_by_its_shapes(tmp_path: Path, changes: dict[str, int], naming: str) -> None:
    dims: FluxDims = dataclasses.replace(DIMS, **changes)
    flux = dense_flux(dims)
    path = save(tmp_path / "flux.safetensors", flux if naming == "bfl" else diffusers_tensors(flux, dims))
    with open_teacher(path) as teacher:
        assert teacher.dims == dims
    assert_same(path, flux)


# What is no FLUX.1, or not a whole one


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("naming", "damage", "message"),
    [
        ("bfl", without("single_blocks.0."), r"single_blocks\.0 missing, though its last .* is single_blocks\.1\."),
        ("bfl", without("double_blocks.0."), r"double_blocks\.0 missing, though"),
        ("diffusers", without("transformer_blocks.0."), r" transformer_blocks\.0 missing, though"),
        ("bfl", without("single_blocks."), r"it has no single_blocks\.0"),
        (
            "bfl",
            lambda tensors: tensors | {"single_blocks.2.linear1.weight": tensors["single_blocks.1.linear1.weight"]},
            r"single_blocks\.2\.\S+ is missing",
        ),
        ("bfl", without("single_blocks.1.linear2.bias"), r"linear2\.bias is missing \(expected shape \[128\]\)"),
        (
            "diffusers",
            without("single_transformer_blocks.1.attn.to_k.bias"),
            r"single_transformer_blocks\.1\.attn\.to_k\.bias is missing \(expected shape \[128\]\)",
        ),
        ("diffusers", without("x_embedder."), r"it has no x_embedder\.weight"),
        (
            "bfl",
            lambda tensors: tensors | {"double_blocks.1.extra.weight": torch.ones(1)},
            r"double_blocks\.1\.extra\.weight \[1\] does not belong to it",
        ),
        (
            "diffusers",
            lambda tensors: tensors | {"transformer_blocks.1.extra.weight": torch.ones(1)},
            r"transformer_blocks\.1\.extra\.weight \[1\] does not belong to it",
        ),
        ("bfl", lambda tensors: tensors | {LINEAR: torch.zeros(897, 128)}, r"has shape \[897, 128\]; expected \[896"),
        ("bfl", lambda tensors: tensors | {"d2m_config": torch.zeros(1)}, "a FLUX-MoE already"),
        ("bfl", lambda _: {"lora_unet_x.lora_down.weight": torch.ones(1)}, "looks like a LoRA"),
        ("bfl", lambda _: {"transformer.single_transformer_blocks.0.lora_A.weight": torch.ones(1)}, "like a LoRA"),
        (
            "diffusers",
            lambda tensors: without("proj_out.")(tensors) | {"controlnet_blocks.0.weight": torch.ones(1)},
            "looks like a ControlNet",
        ),
        ("bfl", lambda _: {"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(1)}, "Stable Diffusion 3"),
    ],
)
def test_what_is_no_whole_flux_is_refused_with_what_is_wrong(
    tmp_path: Path, naming: str, damage: Callable[[Tensors], Tensors], message: str
) -> None:
    flux = dense_flux()
    path = save(tmp_path / "flux.safetensors", damage(flux if naming == "bfl" else diffusers_tensors(flux, DIMS)))
    with pytest.raises(CheckpointError, match=rf"flux\.safetensors: .*{message}"):
        open_teacher(path)


def test_opening_reads_headers_alone(tmp_path: Path) -> None:
    """A file of FLUX.1 dev's size, all holes: reading its data would take minutes, holding them more memory than there is."""
    entries, end = {}, 0
    for name, shape in sorted(dense_shapes(FLUX_DEV).items()):
        begin, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    path = tmp_path / "flux1-dev.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert path.stat().st_size > 23e9
    with open_teacher(path) as teacher:
        assert teacher.dims == FLUX_DEV
        assert teacher.tensor("single_blocks.37.linear2.weight")[-1, -1] == 0

"""Files whose weights are stored in float8 or quantised, in every way that ComfyUI knows on a CPU.

The reference is exact: the dense FLUX whose weights are what the quantised ones stand for, in the teacher's order. Both
sides then differ by the order of sums in float32 alone (1e-5), however coarse the format is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2m_model.config import BlockGroup
from d2m_model.routers import CapacityRouter
from demo.in_process import Comfy
from tests.comfyui.conftest import LINEARS, Pair, in_teachers_order, with_lora
from tests.comfyui.test_saving import as_nodes_run, load, output, save  # noqa: F401 (fixtures)
from tests.toys import files
from tests.toys.compare import distance

ALL = files.LAYOUT.experts
DEVICE = torch.device("cpu")
# Formats for which ComfyUI quantises what goes into a layer as well, on a CPU too: not in layers that are routed.
BOTH_SIDES = ("int8_tensorwise", "convrot_w4a4")
ROUTED = tuple(name for name in LINEARS if name.startswith("single_blocks.") and "linear" in name)
LAYOUTS = {
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, {}),
    "float8_e5m2": ("TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {"scale": "recalculate"}, {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {}, {}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
}
Quantised = tuple[dict[str, Tensor], dict[str, Tensor]]  # a file's tensors, and what its weights stand for


def quantise(split: dict[str, Tensor], kind: str) -> Quantised:
    """The linear layers of the blocks in this format, as ComfyUI stores it."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if kind not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI does not know {kind}")
    layout, how, told = LAYOUTS[kind]
    stored, meant = dict(split), dict(split)
    for name in ROUTED if kind in BOTH_SIDES else LINEARS:
        weight = QuantizedTensor.from_float(split[name], layout, **how)
        meant[name] = weight.dequantize()
        stored |= {key: as_bytes(tensor) for key, tensor in weight.state_dict(name).items()}
        description = json.dumps({"format": kind, **told}).encode()
        stored[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(description), dtype=torch.uint8)
    return stored, meant


def as_bytes(tensor: Tensor) -> Tensor:
    """The type that safetensors of ComfyUI's time do not name, as the bytes that ComfyUI reads it from."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


def scaled(split: dict[str, Tensor], companions: Callable[[str, Tensor], dict[str, Tensor]]) -> Quantised:
    stored, meant = dict(split), dict(split)
    for name in LINEARS:
        scale = split[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
        stored[name] = (split[name] / scale).to(torch.float8_e4m3fn)
        stored |= companions(name.removesuffix(".weight"), scale)
        meant[name] = stored[name].float() * scale
    return stored, meant


def old_scaled(split: dict[str, Tensor]) -> Quantised:
    stored, meant = scaled(split, lambda layer, scale: {f"{layer}.scale_weight": scale})
    return {**stored, "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, meant


def in_header(split: dict[str, Tensor]) -> Quantised:
    return scaled(split, lambda layer, scale: {f"{layer}.weight_scale": scale})


def stored_in_float8(split: dict[str, Tensor]) -> Quantised:
    stored = dict(split) | {name: split[name].to(torch.float8_e4m3fn) for name in LINEARS}
    return stored, dict(split) | {name: stored[name].float() for name in LINEARS}


def smoothed(split: dict[str, Tensor]) -> Quantised:
    """Weights with a pre_quant_scale, by which the layer multiplies its input."""
    from comfy.quant_ops import QUANT_ALGOS

    if "pre_quant_scale" not in QUANT_ALGOS["nvfp4"]["parameters"]:
        pytest.skip("this ComfyUI knows no pre_quant_scale")
    generator = torch.Generator().manual_seed(5)
    scales = {name: torch.rand(width, generator=generator) + 0.5 for name, (_, width) in LINEARS.items()}
    stored, meant = quantise(split | {name: split[name] / scale for name, scale in scales.items()}, "nvfp4")
    stored |= {name.replace(".weight", ".pre_quant_scale"): scale for name, scale in scales.items()}
    return stored, meant | {name: meant[name] * scale for name, scale in scales.items()}


KINDS: dict[str, Callable[[dict[str, Tensor]], Quantised]] = {
    "stored in float8": stored_in_float8,
    "scaled_fp8": old_scaled,
    "listed in the header": in_header,
    **{kind: lambda split, kind=kind: quantise(split, kind) for kind in LAYOUTS},  # type: ignore[misc]
    "smoothed": smoothed,
}


# What quantising anew adds to one evaluation with a LoRA, at most, relative: half as much again as was found (two to
# seven per cent for eight bits, 20 to 23 for four).
ERROR = {kind: 0.35 if kind in ("nvfp4", "convrot_w4a4") else 0.13 for kind in KINDS}


def write(kind: str, tensors: dict[str, Tensor], file: Path) -> Path:
    layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in LINEARS}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if kind == "listed in the header" else None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


@pytest.fixture(scope="module")
def quantised(host: Comfy, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A function from a kind to a file and the MODEL of the dense FLUX that it stands for."""

    @functools.cache
    def made(kind: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("quantised")
        stored, meant = KINDS[kind](pair.split)
        dense = in_teachers_order(meant, pair.dense)
        assert distance(dense["single_blocks.0.linear1.weight"], pair.dense["single_blocks.0.linear1.weight"]) > 1e-3
        file = write(kind, stored, folder / "moe.safetensors")
        return file, host.load(files.save(dense, folder / "dense.safetensors"))

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_paint_what_the_weights_stand_for(
    host: Comfy, pair: Pair, quantised: Callable[[str], tuple[Path, Any]], kind: str
) -> None:
    file, dense = quantised(kind)
    expected = host.sample(dense, steps=1)
    ours, stock = load(host, file), host.load(file)
    for moe in (ours, stock):
        block = moe.model.diffusion_model.single_blocks[0]
        assert distance(host.sample(host.top_k(moe, ALL), steps=1), expected) <= 1e-5
        assert torch.equal(block.router.weight, pair.split["single_blocks.0.router.weight"])
        assert block.neuron_order.dtype == torch.int32
    held = ours.model.diffusion_model.single_blocks[0].linear1.weight
    assert getattr(held, "_qdata", held).dtype.itemsize == 1


# ComfyUI patches a smoothed weight, not what it stands for, so there the LoRA is another than on the dense FLUX.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "smoothed"])
def test_a_lora_is_on_what_the_weights_stand_for(
    host: Comfy, quantised: Callable[[str], tuple[Path, Any]], kind: str
) -> None:
    """Patched as it is used, nothing is quantised anew. Patched in memory, the weight is: then the error is that of the
    format, once more."""
    file, dense = quantised(kind)
    moe, patched = host.top_k(with_lora(load(host, file)), ALL), with_lora(dense)
    host.unload()
    moe.load(DEVICE, lowvram_model_memory=1)
    patched.load(DEVICE, full_load=True)
    found, expected = host.evaluate(moe), host.evaluate(patched)
    for model in (moe, patched):
        model.detach()
    assert distance(found, expected) <= 1e-5
    moe.load(DEVICE, full_load=True)
    in_memory = host.evaluate(moe)
    moe.detach()
    assert distance(in_memory, expected) <= ERROR[kind]


@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_paints_the_same(
    host: Comfy, quantised: Callable[[str], tuple[Path, Any]], kind: str, patched: bool
) -> None:
    moe = load(host, quantised(kind)[0])
    moe = with_lora(moe) if patched else moe
    expected = host.sample(moe, steps=1)
    again = load(host, save(host, moe))
    assert torch.equal(host.sample(again, steps=1), expected)
    held, was = (it.model.diffusion_model.single_blocks[1].linear2.weight for it in (again, moe))
    assert type(held) is type(was)
    assert held.dtype == was.dtype


def test_the_dense_flux_quantised_in_the_same_way_paints_the_same(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    """A scale for the whole tensor does not see the order of the neurons: the same values are stored, reordered."""
    for kind in ("scaled_fp8", "listed in the header"):
        found = load(host, write(kind, KINDS[kind](pair.split)[0], tmp_path / "moe.safetensors"))
        expected = host.load(write(kind, KINDS[kind](pair.dense)[0], tmp_path / "dense.safetensors"))
        assert type(expected.model).__name__ == "Flux"
        assert distance(host.sample(host.top_k(found, ALL), steps=1), host.sample(expected, steps=1)) <= 1e-5
        host.unload()


def described(kind: str) -> Tensor:
    return files.config_tensor(json.dumps({"format": kind}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda it: it.pop("single_blocks.1.linear1.weight_scale"),
            r"single_blocks\.1\.linear1\.weight_scale is missing",
        ),
        (
            lambda it: it.update({"single_blocks.1.router.weight_scale": torch.ones(())}),
            "routers must stay in a floating-point type",
        ),
        (
            lambda it: it.update({"single_blocks.1.linear3.weight_scale": torch.ones(())}),
            r"single_blocks\.1\.linear3\.weight_scale \[\] does not belong to it",
        ),
        (
            lambda it: it.update({"single_blocks.1.linear1.pre_quant_scale": torch.ones(128)}),
            r"single_blocks\.1\.linear1 has a pre_quant_scale, which this ComfyUI does not apply to its format",
        ),
        (
            lambda it: it.update({"single_blocks.1.linear1.comfy_quant": described("of tomorrow")}),
            r"cannot read how the file is quantised \(KeyError: 'of tomorrow'\)",
        ),
    ],
)
def test_what_is_wrong_with_a_quantised_file_is_said(
    host: Comfy, pair: Pair, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    stored, _ = quantise(pair.split, "float8_e4m3fn")
    change(stored)
    with pytest.raises(ValueError, match=message):
        load(host, write("float8_e4m3fn", stored, tmp_path / "wrong.safetensors"))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "scaled_fp8", "listed in the header"])
def test_what_chooses_blocks_and_tokens_is_as_in_the_file(host: Comfy, pair: Pair, tmp_path: Path, kind: str) -> None:
    group = BlockGroup(kind="single", first=0, blocks=3, active=1, selection="topk")
    split = files.split(pair.dense, groups=(group,), capacity=CapacityRouter(capacity=2.0, width=16))
    stored, meant = KINDS[kind](split)
    moe = load(host, write(kind, stored, tmp_path / "moe.safetensors"))
    dense = host.load(files.save(in_teachers_order(meant, pair.dense), tmp_path / "dense.safetensors"))
    everything = host.with_settings(moe, active_blocks=3, capacity=1e9)
    assert distance(host.sample(everything, steps=1), host.sample(dense, steps=1)) <= 1e-5
    held = moe.model.diffusion_model.state_dict()
    routing = [name for name in split if "router" in name or ".capacity." in name or name.endswith(".threshold")]
    assert all(torch.equal(held[name], split[name]) for name in routing)
    again = load(host, save(host, moe))
    assert torch.equal(host.sample(again, (2, 8, 8), steps=1), host.sample(moe, (2, 8, 8), steps=1))


def test_routers_stored_in_float8_still_choose(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    """Some tools cast a whole file: the routers get coarser, but work as if they were cast back."""
    fp8 = torch.float8_e4m3fn
    cast = {name: tensor.to(fp8) if tensor.is_floating_point() else tensor for name, tensor in pair.split.items()}
    up = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in cast.items()}
    found, expected = (
        load(host, write("", tensors, tmp_path / f"{name}.safetensors"))
        for name, tensors in (("cast", cast), ("up", up))
    )
    assert torch.equal(host.sample(found, steps=1), host.sample(expected, steps=1))


SCALED = ("scaled_fp8", "listed in the header", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("kind", ["stored in float8", *SCALED])
def test_experts_take_float8_as_it_is_stored_where_kernels_do(
    host: Comfy, quantised: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The seam of the Triton kernels, which need a GPU: here their part is done by torch, on converted weights."""
    file, dense = quantised(kind)
    blocks, kept = host.module("nodes.model.blocks"), []

    def wide(weight: Tensor, scale: Tensor | None) -> Tensor:
        kept.append((weight.dtype.itemsize, scale is not None and scale.dtype == torch.float32))
        return weight if scale is None else weight.float() * scale

    up, down = blocks.expert_up, blocks.expert_down
    monkeypatch.setattr(blocks, "takes_float8", lambda x: True)
    monkeypatch.setattr(blocks, "expert_up", lambda x, plan, w, bias, scale: up(x, plan, wide(w, scale), bias))
    monkeypatch.setattr(blocks, "expert_down", lambda hidden, plan, w, scale: down(hidden, plan, wide(w, scale)))
    moe = host.top_k(load(host, file), ALL)
    assert distance(host.sample(moe, steps=1), host.sample(dense, steps=1)) <= 1e-5
    assert set(kept) == {(1, True)}
    kept.clear()
    patched = with_lora(moe)
    host.unload()
    patched.load(DEVICE, lowvram_model_memory=1)  # patched as it is used: such weights are wide
    host.evaluate(patched)
    patched.detach()
    assert (4, False) in kept


def divided_layer(weights: Any, layer: Any, x: Tensor, axis: int, cut: int) -> tuple[Tensor, Any, Tensor]:
    """Return the shared part's product, the cast, and what ComfyUI's own layer computes from the same values."""
    with torch.inference_mode():
        cast = weights.cast_linear(layer, x, axis, cut, keep_float8=True)
        if axis == 0:
            found, expected = cast.product(x, layer.bias[:cut]), type(layer).forward(layer, x)[..., :cut]
        else:
            x_first = x * (torch.arange(x.shape[-1]) < cut)
            found, expected = cast.product(x[..., :cut], layer.bias), type(layer).forward(layer, x_first)
        cast.release()
    return found, cast, expected


@pytest.mark.parametrize("kind", ["scaled_fp8", "listed in the header", *LAYOUTS])
def test_the_shared_part_is_computed_as_comfyuis_own_layer_does(
    host: Comfy, quantised: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on a GPU that multiplies the format: the input is quantised too."""
    weights = host.module("nodes.model.weights")
    block = load(host, quantised(kind)[0]).model.diffusion_model.single_blocks[0]
    monkeypatch.setattr(weights, "_in_parts", lambda x: True)
    for layer, axis, cut in ((block.linear1, 0, 4 * files.DIMS.hidden_size), (block.linear2, 1, 256)):
        monkeypatch.setattr(layer, "_full_precision_mm", False)
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
        found, cast, expected = divided_layer(weights, layer, x, axis, cut)
        whole = layer.weight.dequantize()
        rest = whole.narrow(axis, cut, whole.shape[axis] - cut)
        if kind == "convrot_w4a4":  # dequantised whole
            assert torch.equal(torch.cat([cast.shared, cast.experts], axis), whole)
            continue
        assert distance(found, expected) <= 1e-6
        monkeypatch.setattr(layer, "_full_precision_mm", True)
        rough = divided_layer(weights, layer, x, axis, cut)[2]
        assert kind == "int8_tensorwise" or 1e-3 <= distance(rough, expected) <= 0.3
        experts = cast.experts if cast.scale is None else cast.experts.float() * cast.scale
        assert torch.equal(experts, rest)
        assert (cast.scale is None) == (kind not in SCALED)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "nvfp4": ("nvfp4", {}),
    "mxfp8": ("mxfp8", {}),
    "int8": ("int8_tensorwise", {}),
    "int8 by rows": ("int8_tensorwise", {"per_channel": True}),
    "int8 by rows, rotated": ("int8_tensorwise", {"per_channel": True, "convrot": True, "convrot_groupsize": 64}),
}


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_quantised_weight_have_its_values(host: Comfy, form: str) -> None:
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    kind, how = FORMS[form]
    if kind not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI does not know {kind}")
    divided = host.module("nodes.model.quantised_parts").divided
    values = torch.randn(416, 576, generator=torch.Generator().manual_seed(0))  # neither is a multiple of 128
    weight = QuantizedTensor.from_float(values * torch.arange(1, 577), LAYOUTS[kind][0], **how)
    for axis, cut in ((0, 128), (0, 384), (1, 128), (1, 256)):
        parts = divided(weight, kind, axis, cut)
        assert [tuple(part.shape)[axis] for part in parts] == [cut, values.shape[axis] - cut]
        assert torch.equal(torch.cat([part.dequantize() for part in parts], axis), weight.dequantize())
    assert (divided(weight, kind, 1, 16) is None) == (form not in ("int8", "int8 by rows"))


@pytest.mark.parametrize("operations", ["manual_cast", "fp8_ops"])
def test_the_shared_part_of_a_weight_merely_stored_in_float8_is_what_comfyuis_own_layer_computes(
    host: Comfy, operations: str
) -> None:
    """ComfyUI converts such a weight, or multiplies it in float8 if it was started so: `--fast fp8_matrix_mult`."""
    import comfy.ops

    weights, generator = host.module("nodes.model.weights"), torch.Generator().manual_seed(0)
    layer = getattr(comfy.ops, operations).Linear(64, 96, dtype=torch.float8_e4m3fn)
    layer.reset_parameters()
    weight = torch.randn(96, 64, generator=generator).to(torch.float8_e4m3fn)
    layer.load_state_dict({"weight": weight, "bias": torch.randn(96, generator=generator)}, assign=True)
    x = torch.randn(2, 5, 64, generator=generator)
    for axis, cut in ((0, 32), (1, 48)):
        found, cast, expected = divided_layer(weights, layer, x, axis, cut)
        assert cast.experts.dtype == torch.float8_e4m3fn
        assert cast.scale == 1
        assert distance(found, expected) <= 1e-6
    with torch.inference_mode():
        rough, wide = layer(x), torch.nn.functional.linear(x, weight.float(), layer.bias)
    assert (distance(wide, rough) > 1e-3) == (operations == "fp8_ops")  # the input was quantised too

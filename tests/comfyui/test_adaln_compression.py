"""A file with AdaLN compression in ComfyUI: where U and lin' stand for a modulation exactly, it is the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui import loras
from tests.comfyui.conftest import Pair
from tests.toys import files
from tests.toys.compare import distance

ALL = files.LAYOUT.experts
DEVICE = torch.device("cpu")
RANK = 24


@pytest.fixture(scope="module")
def compressed(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("compressed")
    dense, replacements = files.compressible(files.dense_flux(), RANK)
    split = files.split(dense, compressed=replacements)
    dense_file = files.save(dense, folder / "dense.safetensors")
    moe_file = files.save(split, folder / "moe.safetensors")
    return Pair(dense, split, dense_file, moe_file, host.load(dense_file), host.load(moe_file))


@pytest.fixture(autouse=True)
def unpatched(host: Comfy) -> None:
    """ComfyUI leaves a model loaded, with the LoRAs of its last use in its weights."""
    import comfy.model_management

    comfy.model_management.unload_all_models()


def test_it_samples_as_the_teacher(host: Comfy, compressed: Pair) -> None:
    expected = host.sample(compressed.teacher)
    assert distance(host.sample(host.top_k(compressed.moe, ALL)), expected) <= 1e-5
    assert distance(host.sample(host.top_k(compressed.moe, 2)), expected) >= 1e-2


def test_without_u_it_would_not(host: Comfy, compressed: Pair) -> None:
    """The control of the test above: the modulations count in the output."""
    adaln_in = compressed.moe.model.diffusion_model.adaln_in
    expected = host.sample(compressed.teacher)
    kept = adaln_in.weight.data.clone()
    adaln_in.weight.data.mul_(0.9)
    found = host.sample(host.top_k(compressed.moe, ALL))
    adaln_in.weight.data.copy_(kept)
    assert distance(found, expected) >= 1e-2


def test_u_is_held_once_and_every_name_is_the_files(compressed: Pair) -> None:
    flux = compressed.moe.model.diffusion_model
    names = {name.replace("_norm.weight", "_norm.scale") for name in flux.state_dict()}
    assert names == set(compressed.split)
    assert flux.adaln_in.weight.shape == (RANK, 128)
    for lin in (flux.double_blocks[0].img_mod.lin, flux.double_blocks[1].txt_mod.lin):  # 0: a dense block
        assert lin.weight.shape == (6 * 128, RANK)
    assert flux.single_blocks[2].modulation.lin.weight.shape == (3 * 128, RANK)
    assert flux.final_layer.adaLN_modulation[1].weight.shape == (2 * 128, 128)


def test_u_keeps_its_files_precision(host: Comfy, compressed: Pair, tmp_path: Path) -> None:
    """U stays in float32 in a bfloat16 file too, whatever the other weights are cast to."""
    import comfy.sd

    file = files.save(compressed.split, tmp_path / "bf16.safetensors", torch.bfloat16)
    flux = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float8_e4m3fn}).model.diffusion_model
    assert flux.double_blocks[0].img_mod.lin.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(flux.adaln_in.weight, compressed.split["adaln_in.weight"])
    assert host.load(file).model.diffusion_model.adaln_in.weight.dtype == torch.float32


def test_low_vram_casts_u_and_the_modulations(host: Comfy, compressed: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ops

    moe, teacher = host.top_k(compressed.moe, ALL), compressed.teacher
    teacher.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    expected = host.evaluate(teacher)
    teacher.unpatch_model(DEVICE)
    cast, returned = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight
    casts: list[Any] = []
    returns: list[Any] = []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, *a, **k: (casts.append(s), cast(s, *a, **k))[1])
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda s, *a: (returns.append(s), returned(s, *a))[1])
    moe.load(DEVICE, lowvram_model_memory=1)
    flux = moe.model.diffusion_model
    lin = flux.double_blocks[0].img_mod.lin
    assert lin.comfy_cast_weights
    found = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    assert distance(found, expected) <= 1e-5
    modulations = 2 * files.DIMS.double_blocks + files.DIMS.single_blocks
    assert casts.count(flux.adaln_in) == returns.count(flux.adaln_in) == modulations
    assert casts.count(lin) == returns.count(lin) == 1


def test_block_patches_see_the_vec_of_flux(host: Comfy, compressed: Pair) -> None:
    def vecs(model: Any) -> list[Tensor]:
        patched, seen = model.clone(), []

        def through(args: dict, extra: dict) -> dict:
            seen.append(args["vec"].clone())
            return extra["original_block"](args)

        for kind, depth in (("double_block", files.DIMS.double_blocks), ("single_block", files.DIMS.single_blocks)):
            for i in range(depth):
                patched.set_model_patch_replace(through, "dit", kind, i)
        host.sample(patched, steps=1)
        return seen

    found, expected = vecs(compressed.moe), vecs(compressed.teacher)
    assert len(found) == len(expected) == 5
    assert all(torch.equal(a, b) and a.shape == (1, 128) for a, b in zip(found, expected, strict=True))


def test_a_changed_vec_reaches_the_modulations(host: Comfy, compressed: Pair) -> None:
    """A pack that gives a block another vec finds it modulated by that one."""

    def halved(args: dict, extra: dict) -> dict:
        return extra["original_block"]({**args, "vec": args["vec"] * 0.5})

    models = [host.top_k(compressed.moe, ALL), compressed.teacher.clone()]
    for model in models:
        model.set_model_patch_replace(halved, "dit", "single_block", 1)
    found, expected = (host.sample(model, steps=1) for model in models)
    assert distance(found, expected) <= 1e-5
    assert distance(expected, host.sample(compressed.teacher, steps=1)) >= 1e-3


def test_compiled_blocks_have_no_graph_breaks(host: Comfy, compressed: Pair) -> None:
    flux = compressed.moe.model.diffusion_model
    x, vec = torch.randn(1, 40, 128), torch.randn(1, 128)
    common = {"vec": vec, "pe": flux.pe_embedder(torch.zeros(1, 40, 3)), "transformer_options": {}}
    single = flux.single_blocks[0]
    with torch.no_grad():
        compiled = torch.compile(single, fullgraph=True, backend="eager")(x.clone(), **common)
        assert distance(compiled, single(x.clone(), **common)) <= 1e-6
        img, txt = x[:, :30], x[:, 30:]
        dense = flux.double_blocks[0]
        found = torch.compile(dense, fullgraph=True, backend="eager")(img=img.clone(), txt=txt.clone(), **common)
        expected = dense(img=img.clone(), txt=txt.clone(), **common)
        assert distance(torch.cat(found, 1), torch.cat(expected, 1)) <= 1e-6
    torch.compiler.reset()


def test_half_precision_is_that_of_the_teacher(host: Comfy, compressed: Pair, tmp_path: Path) -> None:
    """The two steps of a modulation round about as much in bfloat16 as the dense one does."""
    exact = host.sample(compressed.teacher)
    errors = []
    for name, tensors in (("dense", compressed.dense), ("moe", compressed.split)):
        model = host.load(files.save(tensors, tmp_path / f"{name}.safetensors", torch.bfloat16))
        errors.append(distance(host.sample(host.top_k(model, ALL) if name == "moe" else model), exact))
    dense, moe = errors
    assert moe <= 1.5 * dense


# LoRAs on modulations: a change D of the dense weight is D pinv(U) for lin'


MODULATIONS = [
    *(f"double_blocks.{i}.{stream}_mod.lin" for i in range(files.DIMS.double_blocks) for stream in ("img", "txt")),
    *(f"single_blocks.{i}.modulation.lin" for i in range(files.DIMS.single_blocks)),
]


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 1.0) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]


def lora_of(compressed: Pair, kind: str, naming: str = "BFL", *, within: bool = False) -> dict[str, Tensor]:
    """On every modulation. `within`: of the directions that U keeps."""
    import comfy.lora

    key_map = comfy.lora.model_lora_keys_unet(compressed.teacher.model, {})
    names = {f"{loras.PREFIX}{name}.weight" for name in MODULATIONS}
    keys = loras.NAMINGS[naming].keys(key_map, lambda name, offset: name in names)
    assert len(keys) == len(MODULATIONS)
    shapes = {name: tuple(compressed.dense[name.removeprefix(loras.PREFIX)].shape) for name in names}
    lora = loras.of_kind(kind, [spellings[0] for spellings in keys.values()], key_map, shapes)
    if within:
        down = compressed.split["adaln_in.weight"]
        for key in lora:
            if key.endswith((".lora_down.weight", ".lora_A.weight")):
                lora[key] = lora[key][:, :RANK] @ down
    return lora


def weight_of(model: Any, name: str, kind: str = "weight") -> Tensor:
    return model.patch_weight_to_device(f"{loras.PREFIX}{name}.{kind}", return_weight=True).detach()


def reported(caplog: pytest.LogCaptureFixture) -> float:
    """The relative error that the log names, once."""
    (line,) = (r.message for r in caplog.records if "modulations, which the file stores compressed" in r.message)
    assert f"changes {len(MODULATIONS)} modulations" in line
    assert f"to {RANK} of 128 directions" in line
    return float(line.rstrip(".").rsplit(" ", 1)[1])


@pytest.mark.parametrize("naming", list(loras.NAMINGS))
def test_a_lora_of_the_kept_directions_is_exact(
    host: Comfy, compressed: Pair, naming: str, caplog: pytest.LogCaptureFixture
) -> None:
    lora = lora_of(compressed, "LoRA", naming, within=True)
    with caplog.at_level("INFO"):
        moe = with_lora(compressed.moe, lora)
    expected = host.sample(with_lora(compressed.teacher, lora))
    assert distance(host.sample(host.top_k(moe, ALL)), expected) <= 1e-5
    assert distance(host.sample(compressed.teacher), expected) >= 1e-2
    assert reported(caplog) <= 1e-5


@pytest.mark.parametrize("kind", loras.KINDS)
def test_any_lora_becomes_the_nearest_change(
    host: Comfy, compressed: Pair, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nearest in the dense weight's squares; on loading, on the fly and prefetched. Biases change as in the teacher."""
    import comfy.lora
    from comfy.model_patcher import LowVramPatch

    lora = lora_of(compressed, kind)
    with caplog.at_level("INFO"):
        moe = with_lora(compressed.moe, lora)
    teacher = with_lora(compressed.teacher, lora)
    down = compressed.split["adaln_in.weight"].double()
    assert set(moe.patches) == set(teacher.patches)
    lost = whole = 0.0
    for name in MODULATIONS:
        if f"{loras.PREFIX}{name}.bias" in moe.patches:
            assert torch.equal(weight_of(moe, name, "bias"), weight_of(teacher, name, "bias"))
            assert not torch.equal(weight_of(moe, name, "bias"), compressed.dense[f"{name}.bias"])
        if f"{loras.PREFIX}{name}.weight" not in moe.patches:
            continue
        lin = compressed.split[f"{name}.weight"]
        change = weight_of(teacher, name).double() - lin.double() @ down
        mapped = torch.linalg.lstsq(down.T, change.T).solution.T
        expected = lin + mapped
        assert distance(weight_of(moe, name), expected) <= 1e-5
        assert distance(lin, expected) >= 1e-3
        patch = LowVramPatch(f"{loras.PREFIX}{name}.weight", moe.patches)
        assert distance(patch(lin.clone()), expected) <= 1e-5
        if hasattr(comfy.lora, "prefetch_prepared_value"):  # ComfyUI 0.30
            patch.prepare(torch.empty(patch.memory_required(), dtype=torch.uint8), None)
            assert distance(patch(lin.clone()), expected) <= 1e-5
        lost += float(((weight_of(moe, name).double() - lin.double()) @ down - change).square().sum())
        whole += float(change.square().sum())
    if whole:
        error = (lost / whole) ** 0.5
        assert reported(caplog) == pytest.approx(error, rel=1e-3, abs=1e-6)
        # What rotates rows stays within the row space.
        assert error <= 1e-5 if kind in loras.ROTATIONS else error >= 1e-2
    else:
        assert kind == "bias"
        assert "compressed" not in caplog.text


def test_the_loss_is_that_of_the_files_weights(host: Comfy, compressed: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the model is loaded with the LoRA's last strength in its weights."""
    lora = lora_of(compressed, "set")
    with caplog.at_level("INFO"):
        moe = with_lora(compressed.moe, lora)
    expected = reported(caplog)
    host.sample(moe, steps=1)
    caplog.clear()
    with caplog.at_level("INFO"):
        with_lora(compressed.moe, lora, 0.5)
    assert reported(caplog) == expected


def test_a_low_rank_pair_stays_one(compressed: Pair) -> None:
    """So that a 12 B model's LoRA costs as little as on the dense model, in low VRAM at every step."""
    from comfy.weight_adapter import LoRAAdapter

    moe = with_lora(compressed.moe, lora_of(compressed, "LoRA"))
    for ((_, patch, *_),) in moe.patches.values():
        assert isinstance(patch, LoRAAdapter)
        assert patch.weights[1].shape == (loras.RANK, RANK)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA, rows"])
def test_modulation_loras_in_low_vram(
    host: Comfy, compressed: Pair, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.model_patcher import LowVramPatch

    calls, call = [], LowVramPatch.__call__
    monkeypatch.setattr(LowVramPatch, "__call__", lambda self, weight: (calls.append(self.key), call(self, weight))[1])
    plain = host.evaluate(compressed.moe)
    moe = with_lora(compressed.moe, lora_of(compressed, kind))
    moe.load(DEVICE, lowvram_model_memory=1)
    found = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    assert sorted(calls) == sorted(f"{loras.PREFIX}{name}.weight" for name in MODULATIONS)
    moe.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    expected = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    assert distance(found, expected) <= 1e-5
    assert distance(plain, expected) >= 1e-2


def test_modulation_loras_stack_and_come_off_again(host: Comfy, compressed: Pair) -> None:
    before = {name: tensor.clone() for name, tensor in compressed.moe.model.state_dict().items()}
    kept, lost = lora_of(compressed, "LoRA", within=True), lora_of(compressed, "LoKr")
    moe = with_lora(with_lora(with_lora(compressed.moe, lost, 0.7), kept, -0.5), lost, -0.7)
    teacher = with_lora(compressed.teacher, kept, -0.5)  # what the other adds it takes away again
    assert distance(host.sample(host.top_k(moe, ALL)), host.sample(teacher)) <= 1e-5
    host.sample(compressed.moe)
    after = compressed.moe.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_lora_of_the_compressed_weights_is_applied_as_it_is(
    host: Comfy, compressed: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was trained on such a file."""
    up, down = torch.randn(6 * 128, 4), torch.randn(4, RANK)
    key = f"{loras.PREFIX}double_blocks.0.img_mod.lin"
    moe = with_lora(compressed.moe, {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down})
    found = weight_of(moe, "double_blocks.0.img_mod.lin")
    assert distance(found, compressed.split["double_blocks.0.img_mod.lin.weight"] + up @ down) <= 1e-6
    assert "compressed" not in caplog.text


def test_quantised_modulations(host: Comfy, compressed: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights in float8 as ComfyUI stores them, each with a scale and a description."""
    stored, meant = dict(compressed.split), dict(compressed.split)
    for name in MODULATIONS:
        weight = stored[f"{name}.weight"]
        scale = weight.abs().max() / 448
        stored[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        stored[f"{name}.weight_scale"] = scale
        stored[f"{name}.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        meant[f"{name}.weight"] = stored[f"{name}.weight"].float() * scale
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "stored.safetensors")
    moe = host.load(tmp_path / "stored.safetensors")
    expected = host.load(files.save(meant, tmp_path / "meant.safetensors"))
    assert distance(host.sample(moe), host.sample(expected)) <= 1e-5
    errors = []
    for model in (moe, expected):
        caplog.clear()
        with caplog.at_level("INFO"):
            with_lora(model, lora_of(compressed, "DoRA, rows"))
        errors.append(reported(caplog))
    assert errors[0] == errors[1]

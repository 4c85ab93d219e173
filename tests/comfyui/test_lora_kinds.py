"""Every kind of LoRA, in every naming, on every weight of an FFN: what it makes of the teacher, in our order.

Compared are the weights that ComfyUI patches: as it does on loading, on the fly in low VRAM, and prefetched.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.layout import permute_neurons
from demo.in_process import Comfy
from tests.comfyui import loras
from tests.comfyui.conftest import Pair
from tests.toys import files
from tests.toys.compare import distance

ALL = files.LAYOUT.experts
DEVICE = torch.device("cpu")
FFNS = ("double_blocks.0.img_mlp", "double_blocks.0.txt_mlp", "single_blocks.0.linear")  # every layout


@pytest.fixture(scope="module")
def small(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model with one block of each kind, since ComfyUI looks for a LoRA's keys one by one."""
    dims = replace(files.DIMS, double_blocks=1, single_blocks=1)
    folder, dense = tmp_path_factory.mktemp("small"), files.dense_flux(dims)
    split = files.split(dense, dims, dense_double_blocks=0)
    names = files.save(dense, folder / "dense.safetensors"), files.save(split, folder / "moe.safetensors")
    return Pair(dense, split, *names, *map(host.load, names))


@pytest.fixture(autouse=True)
def unpatched(host: Comfy) -> None:
    """ComfyUI leaves a model loaded, with the LoRAs of its last use in its weights."""
    import comfy.model_management

    comfy.model_management.unload_all_models()


def is_of_an_ffn(name: str, offset: tuple[int, int, int] | None) -> bool:
    """And not of q, k and v, which are the first rows of a linear1."""
    return name.startswith(tuple(f"{loras.PREFIX}{ffn}" for ffn in FFNS)) and (offset is None or offset[1] > 256)


def key_map_of(model: Any) -> dict[str, Any]:
    import comfy.lora

    return comfy.lora.model_lora_keys_unet(model.model, {})


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 0.8) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]


def patched(model: Any, name: str) -> Tensor:
    return model.patch_weight_to_device(name, return_weight=True).detach()


def on_the_fly(model: Any, name: str, weight: Tensor, prefetched: bool) -> Tensor:
    from comfy.model_patcher import LowVramPatch

    patch = LowVramPatch(name, model.patches)
    if prefetched:
        patch.prepare(torch.empty(patch.memory_required(), dtype=torch.uint8), None)
    return patch(weight.clone())


def spellings(small: Pair, naming: str, kind: str) -> list[dict[str, str]]:
    """The naming's keys for every weight of FFNS, one dict for each spelling that it has for them."""
    key_map = key_map_of(small.teacher)
    if kind in loras.WHOLE:
        key_map = {key: target for key, target in key_map.items() if isinstance(target, str)}
    keys = loras.NAMINGS[naming].keys(key_map, is_of_an_ffn)
    rounds = itertools.zip_longest(*keys.values())
    return [{name: key for name, key in zip(keys, one, strict=True) if key is not None} for one in rounds]


def shapes(small: Pair) -> dict[str, tuple[int, ...]]:
    return {f"{loras.PREFIX}{name}": tuple(tensor.shape) for name, tensor in small.dense.items()}


def in_our_order(small: Pair, name: str, tensor: Tensor) -> Tensor:
    neurons = small.moe.model.diffusion_model.neurons()
    place = neurons.get(name.removeprefix(loras.PREFIX))
    return tensor if place is None else permute_neurons(tensor, *place)


@pytest.mark.parametrize("naming", loras.NAMINGS)
@pytest.mark.parametrize("kind", loras.KINDS)
def test_a_weight_becomes_what_it_becomes_in_the_teacher(
    host: Comfy, small: Pair, kind: str, naming: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.lora

    prefetching = hasattr(comfy.lora, "prefetch_prepared_value")  # ComfyUI 0.30
    for keys in spellings(small, naming, kind):
        lora = loras.of_kind(kind, keys.values(), key_map_of(small.teacher), shapes(small))
        teacher, moe = with_lora(small.teacher, lora), with_lora(small.moe, lora)
        with monkeypatch.context() as stock:
            stock.setattr(comfy.lora, "load_lora", comfy.lora.load_lora.__wrapped__)
            control = with_lora(small.moe, lora)
        assert set(moe.patches) == set(teacher.patches)
        names = set(teacher.patches)
        if kind not in ("bias",):
            assert names >= set(keys)
        for name in names:
            short = name.removeprefix(loras.PREFIX)
            in_teacher = patched(teacher, name)
            expected = in_our_order(small, name, in_teacher)
            assert distance(in_teacher, small.dense[short]) >= 1e-2, name
            assert distance(patched(moe, name), expected) <= 1e-6, name
            for prefetched in (False, True)[: 1 + prefetching]:
                assert distance(on_the_fly(moe, name, small.split[short], prefetched), expected) <= 1e-6, name
            if short in small.moe.model.diffusion_model.neurons() and not (
                kind in loras.ROTATIONS and short.endswith(("mlp.2.weight", "linear2.weight"))
            ):
                assert distance(patched(control, name), expected) >= 1e-2, name
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("kind", loras.FAILING)
def test_what_comfyui_cannot_apply_to_the_teacher_leaves_the_weights_alone(
    host: Comfy, small: Pair, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for keys in spellings(small, "BFL", kind):
        lora = loras.of_kind(kind, keys.values(), key_map_of(small.teacher), shapes(small))
        moe = with_lora(small.moe, lora)
        for name in keys:
            assert torch.equal(patched(moe, name), small.split[name.removeprefix(loras.PREFIX)])
            assert f" {name} " in caplog.text  # ComfyUI's ERROR lokr diffusion_model…


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (".lora_up.weight", ".lora_down.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
        (".lora_B.weight", ".lora_A.weight"),
        (".lora.up.weight", ".lora.down.weight"),
        (".lora_B", ".lora_A"),
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        (".lora_B.default.weight", ".lora_A.default.weight"),
    ],
)
def test_every_spelling_of_a_low_rank_pair(host: Comfy, small: Pair, up: str, down: str) -> None:
    (keys, *_) = spellings(small, "diffusers", "LoRA of PEFT")
    spelled = loras.of_kind("LoRA of PEFT", keys.values(), key_map_of(small.teacher), shapes(small))
    lora = {key.replace(".lora_B.weight", up).replace(".lora_A.weight", down): t for key, t in spelled.items()}
    expected, found = with_lora(small.moe, spelled), with_lora(small.moe, lora)
    assert set(found.patches) == set(expected.patches) == set(keys)
    for name in keys:
        assert torch.equal(patched(found, name), patched(expected, name))


def test_a_bias_has_a_key_of_its_own(host: Comfy, small: Pair) -> None:
    """BFL's naming, `….bias` with `.diff`; of linear1 the rows of q, k and v stay where they are."""
    biases = {name: t for name, t in small.dense.items() if name.endswith(("mlp.0.bias", "linear1.bias"))}
    lora = {f"{loras.PREFIX}{name}.diff": loras.Random(3)(*bias.shape) for name, bias in biases.items()}
    moe, teacher = with_lora(small.moe, lora), with_lora(small.teacher, lora)
    assert set(moe.patches) == {f"{loras.PREFIX}{name}" for name in biases}
    for name in moe.patches:
        assert torch.equal(patched(moe, name), in_our_order(small, name, patched(teacher, name)))
    name = f"{loras.PREFIX}single_blocks.0.linear1.bias"
    assert torch.equal(patched(moe, name)[: 3 * 128], patched(teacher, name)[: 3 * 128])
    assert not torch.equal(patched(moe, name)[3 * 128 :], patched(teacher, name)[3 * 128 :])


def test_q_k_and_v_stay_where_they_are(host: Comfy, small: Pair) -> None:
    name = "single_blocks.0.linear1.weight"
    keys = [f"transformer.single_transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    for chosen in (keys, [f"{loras.PREFIX}single_blocks.0.linear1_qkv"]):
        lora = loras.of_kind("DoRA, columns", chosen, key_map_of(small.teacher), shapes(small))
        moe, teacher = with_lora(small.moe, lora), with_lora(small.teacher, lora)
        found = patched(moe, f"{loras.PREFIX}{name}")
        assert torch.equal(found[: 3 * 128], patched(teacher, f"{loras.PREFIX}{name}")[: 3 * 128])
        assert torch.equal(found[3 * 128 :], small.split[name][3 * 128 :])
        assert distance(found[: 3 * 128], small.split[name][: 3 * 128]) >= 1e-2


def control_lora(small: Pair) -> dict[str, Tensor]:
    """The form of BFL's Canny and Depth LoRAs: no prefix, biases as lora_B.bias, whole norms, a shape for img_in."""
    randn, found = loras.Random(5), {}
    for name, tensor in small.dense.items():
        module, _, part = name.rpartition(".")
        if part == "weight":
            rows, columns = tensor.shape
            found[f"{module}.lora_A.weight"] = randn(4, columns, gain=columns**-0.5)
            found[f"{module}.lora_B.weight"] = randn(rows, 4, gain=0.1)
        elif part == "bias":
            found[f"{module}.lora_B.bias"] = randn(*tensor.shape, gain=0.1)
        else:
            found[name] = 1 + randn(*tensor.shape, gain=0.1)
    return found


def test_bfls_control_loras(host: Comfy, small: Pair, caplog: pytest.LogCaptureFixture) -> None:
    lora = control_lora(small)
    moe, teacher = with_lora(small.moe, lora), with_lora(small.teacher, lora)
    assert len(moe.patches) == len(small.dense)
    assert distance(host.sample(host.top_k(moe, ALL)), host.sample(teacher)) <= 1e-5
    assert distance(host.sample(teacher), host.sample(small.teacher)) >= 1e-2
    assert "not loaded" not in caplog.text.lower()


REPRESENTATIVES = [
    ("LoRA", "kohya"),
    ("DoRA, rows", "BFL"),
    ("DoRA, columns", "diffusers"),
    ("LoKr, factorised", "LyCORIS"),
    ("LoHa", "OneTrainer"),
    ("OFT", "diffusers without prefix"),
    ("set", "diffusers"),
]


def of_all_weights(small: Pair, kind: str, naming: str, seed: int = 0) -> dict[str, Tensor]:
    (keys, *_) = spellings(small, naming, kind)
    return loras.of_kind(kind, keys.values(), key_map_of(small.teacher), shapes(small), seed)


@pytest.mark.parametrize(("kind", "naming"), REPRESENTATIVES)
def test_it_samples_as_the_teacher_with_it(
    host: Comfy, small: Pair, kind: str, naming: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.lora

    lora = of_all_weights(small, kind, naming)
    expected = host.sample(with_lora(small.teacher, lora))
    assert distance(host.sample(host.top_k(with_lora(small.moe, lora), ALL)), expected) <= 1e-5
    assert distance(host.sample(small.teacher), expected) >= 1e-2
    assert "not loaded" not in caplog.text.lower()
    monkeypatch.setattr(comfy.lora, "load_lora", comfy.lora.load_lora.__wrapped__)
    assert distance(host.sample(host.top_k(with_lora(small.moe, lora), ALL)), expected) >= 1e-2


@pytest.mark.parametrize(("kind", "naming"), REPRESENTATIVES)
def test_it_does_so_in_low_vram(
    host: Comfy, small: Pair, kind: str, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.model_patcher import LowVramPatch

    calls, call = [], LowVramPatch.__call__
    monkeypatch.setattr(LowVramPatch, "__call__", lambda self, weight: (calls.append(self.key), call(self, weight))[1])
    lora = of_all_weights(small, kind, naming)
    moe, teacher = host.top_k(with_lora(small.moe, lora), ALL), with_lora(small.teacher, lora)
    moe.load(DEVICE, lowvram_model_memory=1)
    found = host.evaluate(moe)
    moe.unpatch_model(DEVICE)
    assert set(calls) == set(moe.patches)
    teacher.load(DEVICE, lowvram_model_memory=1e32, full_load=True)
    expected = host.evaluate(teacher)
    teacher.unpatch_model(DEVICE)
    assert distance(found, expected) <= 1e-5


def test_loras_of_several_kinds_stack_and_come_off_again(host: Comfy, small: Pair) -> None:
    before = {name: tensor.clone() for name, tensor in small.moe.model.state_dict().items()}
    stack = [("DoRA, columns", "kohya", 0.5), ("GLoRA", "diffusers", -0.7), ("BOFT", "LyCORIS", 1.0)]
    moe, teacher = small.moe, small.teacher
    for seed, (kind, naming, strength) in enumerate(stack):
        lora = of_all_weights(small, kind, naming, seed)
        moe, teacher = with_lora(moe, lora, strength), with_lora(teacher, lora, strength)
    expected = host.sample(teacher)
    assert distance(host.sample(host.top_k(moe, ALL)), expected) <= 1e-5
    assert distance(host.sample(small.teacher), expected) >= 1e-2
    host.sample(small.moe)  # which takes the patches off
    after = small.moe.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_hook_schedules_it(host: Comfy, small: Pair) -> None:
    """Create Hook LoRA: patched and un-patched while sampling, for one conditioning."""
    import comfy.hooks
    import comfy.sample

    lora = of_all_weights(small, "DoRA, rows", "kohya")

    def sample(model: Any) -> Tensor:
        positive = host.conditioning(model, 1)
        positive[0][1]["hooks"] = comfy.hooks.create_hook_lora(lora, 0.8, 0.0)
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        negative, empty = host.conditioning(model, 2), torch.zeros_like(noise)
        return comfy.sample.sample(model, noise, 2, 2.0, "euler", "simple", positive, negative, empty, seed=0)

    expected = sample(small.teacher.clone())
    assert distance(sample(host.top_k(small.moe, ALL)), expected) <= 1e-5
    plain = with_lora(small.teacher, lora, 0.0)
    assert distance(host.sample(plain, steps=2, cfg=2.0), expected) >= 1e-2

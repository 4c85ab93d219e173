"""LoRAs fused into the frozen teacher, in every spelling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2m_model.hosts.diffusers import load_transformer
from d2m_model.keys import dense_shapes, diffusers_shapes
from d2m_model.lora_file import LoraError, read_lora
from d2m_model.tensor_file import CheckpointError, TensorFile
from d2m_train import UserError
from d2m_train.run_config import Lora, TeacherSection
from d2m_train.teacher.frozen import open_frozen_teacher
from d2m_train.teacher.known_flux import FLUX_DEV
from d2m_train.teacher.loras import LoraDeltas, fused_file
from tests.toys.teachers import DIMS, METADATA, ask, dense_flux, save_flux

RANK = 3


def pair(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """(up, down)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)


H = DIMS.hidden_size
QKV, LINEAR1, FINAL = "double_blocks.1.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"
UPS = {QKV: pair(3 * H, H, 1), LINEAR1: pair(7 * H, H, 2), FINAL: pair(2 * H, H, 3)}


def diffusers_spelling(alpha: float | None) -> dict[str, Tensor]:
    up, down = UPS[QKV]
    tensors: dict[str, Tensor] = {}
    for name, rows in zip("qkv", up.split(H), strict=True):
        tensors |= {f"transformer_blocks.1.attn.to_{name}.lora_B.weight": rows.contiguous()}
        tensors |= {f"transformer_blocks.1.attn.to_{name}.lora_A.weight": down.clone()}
    up, down = UPS[LINEAR1]
    for name, rows in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), up.split([H, H, H, 4 * H]), strict=True):
        tensors |= {f"single_transformer_blocks.0.{name}.lora_B.weight": rows.contiguous()}
        tensors |= {f"single_transformer_blocks.0.{name}.lora_A.weight": down.clone()}
    up, down = UPS[FINAL]
    tensors |= {"norm_out.linear.lora_B.weight": torch.cat(up.chunk(2)[::-1]), "norm_out.linear.lora_A.weight": down}
    if alpha is not None:
        tensors |= {
            f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(alpha) for name in tensors if "lora_A" in name
        }
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


def bfl_spelling(prefix: str, down: str, up: str, alpha: float | None, dots: str = ".") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (up_OR, down_RI) in UPS.items():
        module = prefix + name.replace(".", dots)
        tensors |= {f"{module}.{up}.weight": up_OR, f"{module}.{down}.weight": down_RI}
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(alpha: float | None) -> dict[str, Tensor]:
    return bfl_spelling("lora_unet_", "lora_down", "lora_up", alpha, dots="_")


def kohya_of_diffusers_names(alpha: float | None) -> dict[str, Tensor]:
    return {
        "lora_"
        + module.replace(".", "_")
        + dot
        + role.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, tensor in diffusers_spelling(alpha).items()
        for module, dot, role in [name.partition(".alpha" if name.endswith(".alpha") else ".lora_")]
        for role in [role if dot == ".alpha" else "lora_" + role]
        for dot in [".alpha" if dot == ".alpha" else "."]
    }


SPELLINGS: dict[str, Callable[[float | None], dict[str, Tensor]]] = {
    "diffusers": diffusers_spelling,
    "kohya": kohya,
    "kohya, diffusers' names": kohya_of_diffusers_names,
    "ComfyUI": lambda alpha: bfl_spelling("diffusion_model.", "lora_A", "lora_B", alpha),
    "BFL": lambda alpha: bfl_spelling("", "lora_A", "lora_B", alpha),
    "PEFT with the adapter's name": lambda alpha: {
        f"base_model.model.{key.removeprefix('transformer.')}".replace(".weight", ".my-style.weight"): tensor
        for key, tensor in diffusers_spelling(alpha).items()
    },
    "prefixes twice": lambda alpha: bfl_spelling("diffusion_model.diffusion_model.", "lora_A", "lora_B", alpha),
    "lycoris": lambda alpha: bfl_spelling("lycoris_", "lora_down", "lora_up", alpha, dots="_"),
    "without .weight": lambda alpha: {
        key.removesuffix(".weight"): tensor for key, tensor in bfl_spelling("", "lora_A", "lora_B", alpha).items()
    },
    "stored whole": lambda alpha: {
        f"diffusion_model.{name}.diff": (1 if alpha is None else alpha / RANK) * up @ down
        for name, (up, down) in UPS.items()
    },
    "fal": lambda alpha: bfl_spelling("base_model.model.", "lora_A", "lora_B", alpha),
}


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_lora_adds_strength_alpha_by_rank_of_b_a(
    spelling: str, alpha: float | None, flux: Path, tmp_path: Path
) -> None:
    save_file(SPELLINGS[spelling](alpha), tmp_path / "lora.safetensors")
    section = TeacherSection(path=flux, loras=(Lora(path=tmp_path / "lora.safetensors", strength=0.5),))
    fused = load_file(fused_file(section, tmp_path / "fused.safetensors"))
    for name, weight in dense_flux().items():
        if (module := name.removesuffix(".weight")) in UPS:
            up, down = UPS[module]
            weight = (weight.float() + 0.5 * (1 if alpha is None else alpha / RANK) * up @ down).bfloat16()
        assert torch.equal(fused[name], weight), name


def test_peft_configuration_in_the_header_says_alpha(flux: Path, tmp_path: Path) -> None:
    config = '{"transformer.lora_alpha": 12, "transformer.r": 3, "transformer.alpha_pattern": {"attn.to_q": 6}}'
    save_file(diffusers_spelling(None), tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": config})
    deltas = LoraDeltas(DIMS, [(tmp_path / "lora.safetensors", 1.0)])
    up, down = UPS[QKV]
    found = deltas.fused(f"{QKV}.weight", torch.zeros(3 * H, H))
    assert torch.allclose(found[:H], 2 * up[:H] @ down, atol=1e-5)
    assert torch.allclose(found[H:], 4 * up[H:] @ down, atol=1e-5)


@pytest.mark.parametrize("module", ["double_blocks.1.img_attn.qkv", "single_blocks.0.linear1"])
def test_of_several_alpha_patterns_the_first_that_matches_counts_as_in_peft(module: str) -> None:
    from peft.utils.other import get_pattern_key

    patterns = {"img_attn.qkv": 6, r"double_blocks\.\d+\.img_attn\.qkv": 9, "linear1": 12, "qkv": 15}
    config = {"lora_alpha": 3, "alpha_pattern": patterns, "use_rslora": False}
    up, down = UPS[module]
    lora = {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}
    (change,) = read_lora(lora, DIMS, config).changes
    assert change.scale == patterns[get_pattern_key(list(patterns), module)] / RANK
    (change,) = read_lora(lora, DIMS, config | {"use_rslora": True, "alpha_pattern": {}}).changes
    assert change.scale == 3 / RANK**0.5


@pytest.mark.parametrize("given", ["folder", "file in it"])
def test_a_folder_that_peft_saved_has_its_alpha_in_adapter_config(given: str, flux: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {
        f"base_model.model.{name.removeprefix('transformer.')}": tensor
        for name, tensor in diffusers_spelling(None).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 48, "alpha_pattern": {"attn.to_q": 6}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lora = folder if given == "folder" else folder / "adapter_model.safetensors"
    deltas = LoraDeltas(DIMS, [(lora, 1.0)])
    up, down = UPS[QKV]
    found = deltas.fused(f"{QKV}.weight", torch.zeros(3 * H, H))
    assert torch.allclose(found[:H], 2 * up[:H] @ down, atol=1e-5)
    assert torch.allclose(found[H:], 16 * up[H:] @ down, atol=1e-4)
    section = TeacherSection(path=flux, loras=(Lora(path=lora),))
    fused_file(section, tmp_path / "fused.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6}))
    with pytest.raises(UserError, match="made from other loras"):
        fused_file(section, tmp_path / "fused.safetensors")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: .* is not valid JSON"):
        LoraDeltas(DIMS, [(lora, 1.0)])


def test_a_lora_fuses_into_a_float32_teacher(tmp_path: Path) -> None:
    """Its tensors are read-only views of the mapped file, and float32 needs no conversion."""
    weights = {name: tensor.float() for name, tensor in dense_flux().items()}
    save_file(weights, tmp_path / "flux.safetensors")
    save_file(kohya(None), tmp_path / "lora.safetensors")
    before = (tmp_path / "flux.safetensors").read_bytes()
    section = TeacherSection(path=tmp_path / "flux.safetensors", loras=(Lora(path=tmp_path / "lora.safetensors"),))
    fused = load_file(fused_file(section, tmp_path / "fused.safetensors"))
    up, down = UPS[QKV]
    torch.testing.assert_close(fused[f"{QKV}.weight"], weights[f"{QKV}.weight"] + up @ down)
    assert torch.equal(fused["img_in.weight"], weights["img_in.weight"])
    assert (tmp_path / "flux.safetensors").read_bytes() == before


def test_biases_and_norms_of_a_control_lora_are_fused(flux: Path, tmp_path: Path) -> None:
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    lora = SPELLINGS["BFL"](None) | {f"{QKV}.lora_B.bias": torch.ones(3 * H), norm: torch.full((128,), 3.0)}
    save_file(lora, tmp_path / "lora.safetensors")
    deltas = LoraDeltas(DIMS, [(tmp_path / "lora.safetensors", 0.5)])
    assert torch.equal(deltas.fused(f"{QKV}.bias", torch.zeros(3 * H)), torch.full((3 * H,), 0.5))
    assert torch.equal(deltas.fused(norm, torch.ones(128)), torch.full((128,), 2.0))


def flux1_loras() -> dict[str, dict[str, Tensor]]:
    """Files at FLUX.1's depth and width, which diffusers' converters want, of rank 2."""
    h = FLUX_DEV.hidden_size
    kohya_names: dict[str, Tensor] = {}
    control: dict[str, Tensor] = {}
    for name, shape in dense_shapes(FLUX_DEV).items():
        module = name.rpartition(".")[0]
        if name.endswith(".scale"):
            control[name] = torch.rand(shape)
        elif name.endswith(".weight"):
            up, down = torch.randn(shape[0], 2), torch.randn(2, shape[1])
            control |= {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}
            if not module.startswith("final_layer"):  # whose alpha diffusers leaves out
                key = f"lora_unet_{module.replace('.', '_')}"
                kohya_names |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
                kohya_names[f"{key}.alpha"] = torch.tensor(0.25)
    processors: dict[str, Tensor] = {}
    for module, rows, columns in (
        ("double_blocks.3.processor.qkv_lora1", 3 * h, h),
        ("double_blocks.3.processor.proj_lora2", h, h),
        ("single_blocks.5.processor.qkv_lora", 3 * h, h),
        ("single_blocks.5.processor.proj_lora", h, 5 * h),
    ):
        processors |= {f"{module}.up.weight": torch.randn(rows, 2), f"{module}.down.weight": torch.randn(2, columns)}
    return {"kohya": kohya_names, "BFL control": control, "XLabs": processors}


@pytest.mark.parametrize("kind", ["kohya", "BFL control", "XLabs"])
def test_diffusers_own_converters_agree_where_they_know_the_model(kind: str, tmp_path: Path) -> None:
    from diffusers.loaders import FluxLoraLoaderMixin

    torch.manual_seed(0)
    lora = flux1_loras()[kind]
    save_file(lora, tmp_path / "lora.safetensors")
    deltas = LoraDeltas(FLUX_DEV, [(tmp_path / "lora.safetensors", 1.0)])
    theirs = {
        name.removeprefix("transformer."): t for name, t in FluxLoraLoaderMixin.lora_state_dict(dict(lora)).items()
    }
    shapes = dense_shapes(FLUX_DEV)
    for name in ("double_blocks.3.img_attn.qkv", "double_blocks.3.txt_attn.proj", "single_blocks.5.linear1", "img_in"):
        weight = f"{name}.weight"
        if weight not in deltas.names:
            continue
        found = deltas.fused(weight, torch.zeros(shapes[weight]))
        parts = {
            "double_blocks.3.img_attn.qkv": [f"transformer_blocks.3.attn.to_{x}" for x in "qkv"],
            "double_blocks.3.txt_attn.proj": ["transformer_blocks.3.attn.to_add_out"],
            "single_blocks.5.linear1": [
                f"single_transformer_blocks.5.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            ],
            "img_in": ["x_embedder"],
        }[name]
        rows = [diffusers_shapes(FLUX_DEV)[f"{part}.weight"][0] for part in parts]
        for part, ours in zip(parts, found.split(rows), strict=True):
            if f"{part}.lora_B.weight" in theirs:
                expected = theirs[f"{part}.lora_B.weight"] @ theirs[f"{part}.lora_A.weight"]
                assert torch.allclose(ours, expected), part
                assert expected.any()
            else:
                assert not ours.any(), part


WRONG = {
    "the LoRA of another model": (
        {"lora_unet_up_blocks_0_attn.lora_down.weight": torch.zeros(1, 4)},
        "lora_unet_up_blocks_0",
    ),
    "DoRA": (kohya(None) | {"lora_unet_img_in.dora_scale": torch.ones(1)}, r"img_in\.dora_scale"),
    "half a pair": ({f"{QKV}.lora_A.weight": torch.zeros(1, H)}, r"qkv\.lora_A"),
    "twice in one file": (kohya(None) | diffusers_spelling(None), "twice"),
    "of a wider FLUX": (
        {f"{QKV}.lora_A.weight": torch.zeros(1, 256), f"{QKV}.lora_B.weight": torch.zeros(768, 1)},
        r"qkv\.lora_A\.weight is \[1, 256\]; expected \[1, 128\].*another model",
    ),
    "of a deeper FLUX": ({"lora_unet_double_blocks_9_img_mlp_0.lora_up.weight": torch.zeros(1, 1)}, "double_blocks_9"),
    "NaN": (
        {f"{QKV}.lora_A.weight": torch.zeros(1, H), f"{QKV}.lora_B.weight": torch.full((3 * H, 1), float("nan"))},
        r"qkv\.lora_B\.weight has NaN",
    ),
    "rank 0": (
        {f"{QKV}.lora_A.weight": torch.zeros(0, H), f"{QKV}.lora_B.weight": torch.zeros(3 * H, 0)},
        r"qkv\.lora_A\.weight is \[0, 128\], of rank 0",
    ),
    "several alphas": (
        kohya(1.0) | {"lora_unet_double_blocks_1_img_attn_qkv.alpha": torch.ones(2)},
        "expected one number",
    ),
    "an infinite alpha": (kohya(float("inf")), "The scale of .* is inf"),
    "nothing but a text encoder's": ({"lora_te1_x.lora_up.weight": torch.zeros(1, 1)}, "nothing for a FLUX"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(what: str, flux: Path, tmp_path: Path) -> None:
    tensors, message = WRONG[what]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    section = TeacherSection(path=flux, loras=(Lora(path=tmp_path / "lora.safetensors"),))
    with pytest.raises(UserError, match=message):
        fused_file(section, tmp_path / "fused.safetensors")
    assert not (tmp_path / "fused.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern has '.*'; expected a module's name or a simple pattern"),
        ({"alpha_pattern": {".*.*.*x": 1}}, "expected a module's name or a simple pattern"),
        ({"alpha_pattern": {"x" * 201: 1}}, "expected a module's name or a simple pattern"),
        ({"alpha_pattern": {"(": 1}}, "is no pattern"),
        ({"alpha_pattern": [1]}, "expected an object of alphas by module"),
        ({"lora_alpha": "16"}, "alpha of .* is '16'; expected a number"),
    ],
)
def test_a_hostile_configuration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        read_lora(diffusers_spelling(None), DIMS, config)


def test_a_text_encoders_keys_are_counted_and_said(flux: Path, tmp_path: Path) -> None:
    lora = kohya(None) | {f"lora_te1_layer.{role}.weight": torch.zeros(1, 1) for role in ("lora_up", "lora_down")}
    save_file(lora, tmp_path / "lora.safetensors")
    section = TeacherSection(path=flux, loras=(Lora(path=tmp_path / "lora.safetensors", strength=0.125),))
    notes: list[str] = []
    fused_file(section, tmp_path / "fused.safetensors", notes.append)
    assert notes == [
        "lora.safetensors changes 3 layers at strength 0.125; 2 tensors belong to a text encoder and are left out."
    ]


def test_a_missing_teacher_or_lora_is_named(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: there is no such file"):
        open_frozen_teacher(TeacherSection(path=tmp_path / "gone.safetensors"))
    section = TeacherSection(path=flux, loras=(Lora(path=tmp_path / "lost.safetensors"),))
    with pytest.raises(UserError, match=r"lost\.safetensors: there is no such LoRA"):
        fused_file(section, tmp_path / "fused.safetensors")


def test_the_fused_file_is_kept_and_another_teachers_never_replaced(flux: Path, tmp_path: Path) -> None:
    save_file(kohya(None), tmp_path / "lora.safetensors")
    target = tmp_path / "run" / "fused.safetensors"
    section = TeacherSection(path=flux, loras=(Lora(path=tmp_path / "lora.safetensors"),))
    fused_file(section, target)
    before = target.stat()
    fused_file(section, target)
    assert (target.stat().st_mtime_ns, target.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    with TensorFile(target) as file:
        assert file.metadata["modelspec.title"] == f"{METADATA['modelspec.title']} + lora"
        assert file.metadata["modelspec.license"] == METADATA["modelspec.license"]
    stronger = TeacherSection(path=flux, loras=(Lora(path=tmp_path / "lora.safetensors", strength=2.0),))
    with pytest.raises(UserError, match="made from other loras"):
        fused_file(stronger, target)
    save_flux(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a fused teacher"):
        fused_file(section, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="this is read"):
        fused_file(section, flux)
    assert target.stat().st_mtime_ns == before.st_mtime_ns


def test_the_teacher_with_loras_is_asked_as_fused(flux: Path, tmp_path: Path) -> None:
    save_file(kohya(None), tmp_path / "lora.safetensors")
    section = TeacherSection(path=flux, loras=(Lora(path=tmp_path / "lora.safetensors", strength=0.3),))
    fused = fused_file(section, tmp_path / "fused.safetensors")
    teacher = open_frozen_teacher(section, fused=fused)
    assert torch.equal(ask(teacher), ask(load_transformer(fused)))
    assert not torch.equal(ask(teacher), ask(load_transformer(flux)))

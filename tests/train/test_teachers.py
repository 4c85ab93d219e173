"""The frozen teacher: quantised, offloaded, streamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2m_model.hosts.diffusers import load_transformer
from d2m_train.commands.report import EMOJI_FILE
from d2m_train.data.emoji import EmojiData
from d2m_train.flow.velocity import noised, velocity
from d2m_train.run_config import TeacherSection
from d2m_train.teacher.frozen import open_frozen_teacher
from tests.toys.teachers import DIMS, ask, dense_flux, diffusers_tensors

ROOT = Path(__file__).parents[2]


# Quantisation


def emoji_velocity(section: TeacherSection) -> Tensor:
    teacher = open_frozen_teacher(section)
    batch = EmojiData().batch(0, 4, seed=0)
    assert batch.tokens_BTC is not None
    noise = torch.randn(batch.tokens_BTC.shape, generator=torch.Generator().manual_seed(0))
    t_B = torch.tensor([0.2, 0.5, 0.7, 0.95])
    with torch.no_grad():
        return velocity(teacher, batch, noised(batch.tokens_BTC, noise, t_B), t_B, batch.guidance_B, True).float()


# Of the velocity at four noise levels. Measured: int8 0.0068, fp8 0.025, nf4 0.091. Each bound would be missed by
# the next finer format, or none at all, and by the next coarser.
@pytest.mark.parametrize(("form", "least", "most"), [("int8", 0.003, 0.012), ("fp8", 0.015, 0.04), ("nf4", 0.06, 0.13)])
def test_quantised_the_teacher_is_off_by_what_the_format_rounds(form: str, least: float, most: float) -> None:
    exact = emoji_velocity(TeacherSection(path=EMOJI_FILE, dtype="float32"))
    section = TeacherSection.model_validate({"path": EMOJI_FILE, "dtype": "float32", "quantise": form})
    error = (emoji_velocity(section) - exact).norm() / exact.norm()
    assert least < error < most


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4)])
def test_only_the_blocks_linears_are_quantised_and_they_are_small(form: str, bits: int, flux: Path) -> None:
    teacher = open_frozen_teacher(TeacherSection.model_validate({"path": flux, "quantise": form}))
    plain = load_transformer(flux)
    for name, module in teacher.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        if "transformer_blocks." in name:
            assert type(weight.data) is not Tensor
            names, _ = weight.data.__tensor_flatten__()  # type: ignore[attr-defined]
            held = 8 * sum(
                tensor.nbytes for tensor in (getattr(weight.data, n) for n in names) if isinstance(tensor, Tensor)
            )
            assert held < (bits + 1.5) * weight.numel()
        else:
            assert torch.equal(weight, plain.get_submodule(name).weight)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# Offloading


@pytest.mark.parametrize("offload", ["none", "cpu", "stream"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wherever_its_weights_wait_the_teacher_says_the_same(offload: str, dtype: str, flux: Path) -> None:
    kind = getattr(torch, dtype)
    teacher = open_frozen_teacher(TeacherSection.model_validate({"path": flux, "dtype": dtype, "offload": offload}))
    expected = ask(load_transformer(flux, kind), dtype=kind)
    assert not teacher.training
    for _ in range(2):
        assert torch.equal(ask(teacher, dtype=kind), expected)
    held = {parameter.is_meta for parameter in teacher.transformer_blocks.parameters()}
    assert held == {offload == "stream"}


def test_a_streamed_teacher_may_be_float8_shards_in_diffusers_names(tmp_path: Path) -> None:
    tensors = {
        name: tensor.to(torch.float8_e4m3fn).contiguous()
        for name, tensor in diffusers_tensors(dense_flux(), DIMS).items()
    }
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of in shards.items():
        save_file({name: tensors[name] for name in of}, tmp_path / file)
    index = {name: file for file, of in shards.items() for name in of}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    teacher = open_frozen_teacher(TeacherSection(path=tmp_path, offload="stream"))
    assert torch.equal(ask(teacher), ask(load_transformer(tmp_path)))


def test_a_block_that_fails_leaves_no_weights_behind(flux: Path) -> None:
    teacher = open_frozen_teacher(TeacherSection(path=flux, offload="stream"))
    with pytest.raises(RuntimeError):
        teacher.transformer_blocks[0](torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 3))
    assert all(parameter.is_meta for parameter in teacher.transformer_blocks.parameters())


@pytest.mark.parametrize(
    ("offload", "said"),
    [("stream", "leave out quantise nf4"), ("cpu", "quantise is nf4; expected one of the two: leave out quantise")],
)
def test_an_offloaded_teacher_is_not_quantised(offload: str, said: str, flux: Path) -> None:
    """diffusers moves a block's weights through pinned memory, where torchao's tensors have no place."""
    with pytest.raises(ValueError, match=said):
        TeacherSection.model_validate({"path": flux, "offload": offload, "quantise": "nf4"})


MEASURE = """
import json, sys, torch
from pathlib import Path
from diffusers import FluxTransformer2DModel
from d2m_train.run_config import TeacherSection
from d2m_train.teacher.frozen import open_frozen_teacher

def resident():
    lines = (line.split() for line in open("/proc/self/status"))
    return {name[:-1]: int(rest[0]) / 1024 for name, *rest in lines if name in ("RssAnon:", "RssFile:")}

def measured(offload, dtype):
    inputs = dict(
        hidden_states=torch.zeros(1, 16, 64), encoder_hidden_states=torch.zeros(1, 4, 32),
        pooled_projections=torch.zeros(1, 48), timestep=torch.ones(1), guidance=torch.ones(1),
    )
    inputs = {name: value.to(getattr(torch, dtype)) for name, value in inputs.items()}
    before = resident()
    teacher = open_frozen_teacher(TeacherSection(path=Path(sys.argv[1]), offload=offload, dtype=dtype))
    most = dict.fromkeys(before, 0)

    def look(*_):
        for kind, now in resident().items():
            most[kind] = max(most[kind], now - before[kind])

    for block in (*teacher.transformer_blocks, *teacher.single_transformer_blocks):
        for module in block.modules():
            module.register_forward_hook(look)
    with torch.no_grad():
        teacher(**inputs, img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(4, 3), return_dict=False)
    return most["RssAnon"], most["RssFile"]

measured("stream", "bfloat16")  # what a first forward loads of the libraries
print(json.dumps([measured("stream", "bfloat16"), measured("stream", "float32"), measured("none", "bfloat16")]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_streamed_the_memory_is_a_blocks_and_not_the_models(tmp_path: Path) -> None:
    dims = replace(DIMS, hidden_size=512, double_blocks=2, single_blocks=6)
    save_file(dense_flux(dims), tmp_path / "large.safetensors")
    size = (tmp_path / "large.safetensors").stat().st_size / 2**20
    block = 2 * 36 * 512**2 / 2**20  # MiB of a double block in bfloat16
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large.safetensors")]
    # What is freed goes back at once, as it does by itself with blocks of a real FLUX's size.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    where_it_is_mapped, copied, held = json.loads(done.stdout)
    assert size > 4 * block
    assert where_it_is_mapped[0] < block
    assert where_it_is_mapped[1] < 4 * block
    assert 1.5 * block < copied[0] < 3 * block  # in float32
    assert held[0] > 0.9 * size

"""Weights are in the file until they are used, then once in memory, and nowhere after unloading."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2m_model.config import paper_layout
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair, with_lora
from tests.comfyui.test_saving import load
from tests.toys import files
from tools.host import ROOT


def storages() -> Iterator[int]:
    """Bytes of every tensor storage of this process, each once."""
    seen = set()
    for it in gc.get_objects():
        if type(it) in (torch.Tensor, torch.nn.Parameter):  # not the compiler's, which have none
            storage = it.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage.nbytes()


@pytest.mark.parametrize("patched", [False, True], ids=["as loaded", "with a LoRA"])
def test_unloading_and_letting_go_frees_every_weight(host: Comfy, pair: Pair, patched: bool) -> None:
    """Load, sample, unload: again and again without growth. What earlier tests left may go meanwhile."""
    host.unload()
    sums = []
    for _ in range(3):
        moe = load(host, pair.moe_file)
        if patched:
            moe = with_lora(moe)
        host.sample(host.top_k(moe, 3), steps=1)
        dead = [weakref.ref(moe.model), weakref.ref(moe.model.diffusion_model)]
        dead += [weakref.ref(parameter) for parameter in moe.model.diffusion_model.parameters()]
        host.unload()
        del moe
        gc.collect()
        assert not [reference for reference in dead if reference() is not None]
        sums.append(sum(storages()))
    assert sums[0] >= sums[1] >= sums[2]


def test_unloading_leaves_the_weights_as_they_were(host: Comfy, pair: Pair) -> None:
    moe = load(host, pair.moe_file)
    before = {name: tensor.data_ptr() for name, tensor in moe.model.diffusion_model.state_dict().items()}
    host.sample(with_lora(moe), steps=1)
    host.unload()
    assert {name: tensor.data_ptr() for name, tensor in moe.model.diffusion_model.state_dict().items()} == before


def test_writing_into_a_mapped_weight_leaves_the_file_alone(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    """Hooks patch in place like this."""
    file = files.save(pair.split, tmp_path / "moe.safetensors", torch.bfloat16)
    digest = hashlib.sha256(file.read_bytes()).digest()
    moe = load(host, file)
    expected = host.sample(moe, steps=1)
    weight = moe.model.diffusion_model.single_blocks[0].linear1.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        assert not torch.equal(host.sample(moe, steps=1), expected)
        weight.copy_(kept)
    assert torch.equal(host.sample(moe, steps=1), expected)
    assert hashlib.sha256(file.read_bytes()).digest() == digest


# In a process of its own, whose memory can be told.
MEASURED = """
import json, sys
from pathlib import Path
import torch
from tests.comfyui.conftest import with_lora
from demo.in_process import Comfy

torch.set_num_threads(1)
file, base = sys.argv[1], Path(sys.argv[2])

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

host = Comfy(base)
host.load_pack()
before = anonymous()
with torch.inference_mode():
    moe = host.module("nodes.files.load_node").load_flux_moe(file)
    grown = anonymous() - before
    samples = [host.sample(moe, (1, 4, 4), steps=1)]
    samples.append(host.sample(host.load(Path(file)), (1, 4, 4), steps=1))
    host.sample(with_lora(moe), (1, 4, 4), steps=1)
    samples.append(host.sample(moe, (1, 4, 4), steps=1))
print(json.dumps([grown, *(torch.equal(sample, samples[0]) for sample in samples[1:])]))
"""


def test_a_file_is_mapped_not_read(tmp_path: Path) -> None:
    dims = replace(files.DIMS, hidden_size=768, double_blocks=1, single_blocks=1)
    split = files.split(files.dense_flux(dims), dims, paper_layout(768), dense_double_blocks=0)
    file = files.save(split, tmp_path / "moe.safetensors", torch.bfloat16)
    size, digest = file.stat().st_size, hashlib.sha256(file.read_bytes()).digest()
    assert size > 50 << 20
    command = [sys.executable, "-c", MEASURED, str(file), str(tmp_path / "comfyui")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, same_as_stock, same_after_a_lora = json.loads(done.stdout.splitlines()[-1])
    assert grown < size / 10
    assert same_as_stock
    assert same_after_a_lora
    assert hashlib.sha256(file.read_bytes()).digest() == digest

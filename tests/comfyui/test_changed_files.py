"""A file that changes while its weights are mapped: a message, in place of a dead process or another picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.test_saving import load
from tests.toys import files

SIZE = (1, 8, 8)


def truncate(file: Path) -> None:
    os.truncate(file, 1000)


def write_over(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\x00\x00\xc0\x7f")  # NaN
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # the clock of a file system may be coarse


def replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    os.replace(other, file)


@pytest.fixture
def file(pair: Pair, tmp_path: Path) -> Path:
    return files.save(pair.split, tmp_path / "moe.safetensors")


@pytest.mark.parametrize("change", [truncate, write_over, replace])
@pytest.mark.parametrize("stock", [False, True], ids=["Load FLUX-MoE", "Load Diffusion Model"])
def test_a_changed_file_is_named_before_it_is_read(
    host: Comfy, file: Path, change: Callable[[Path], None], stock: bool
) -> None:
    moe = host.load(file) if stock else load(host, file)
    if stock:
        if not hasattr(moe, "cached_patcher_init"):
            pytest.skip("this ComfyUI does not say which file a model was loaded from")
        host.sample(moe, SIZE, steps=1)  # the file is known from the first run on
    host.unload()
    change(file)
    with pytest.raises(
        RuntimeError, match=r"moe\.safetensors was written to or replaced after it was loaded.*Queue again"
    ):
        host.sample(host.top_k(moe, 3), SIZE, steps=1)
    with pytest.raises(RuntimeError, match="was written to or replaced"):
        host.run("D2MSaveFluxMoE", model=moe, filename_prefix="diffusion_models/changed")


def test_a_deleted_file_stays_as_it_is(host: Comfy, file: Path) -> None:
    moe = load(host, file)
    expected = host.sample(moe, SIZE, steps=1)
    file.unlink()
    assert torch.equal(host.sample(moe, SIZE, steps=1), expected)


def test_the_loader_runs_again_for_a_changed_file(host: Comfy, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(file.parent)], {".safetensors"}))
    node: Any = host.nodes.NODE_CLASS_MAPPINGS["D2MLoadFluxMoE"]
    found = [node.fingerprint_inputs(model_name=file.name, weight_dtype="default") for _ in range(2)]
    write_over(file)
    found.append(node.fingerprint_inputs(model_name=file.name, weight_dtype="default"))
    assert found[0] == found[1] != found[2]
    assert node.fingerprint_inputs(model_name="missing.safetensors", weight_dtype="default") is None


def test_without_mapping_a_file_is_read_whole(host: Comfy, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_mmap", True)
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    moe = load(host, file)
    expected = host.sample(moe, SIZE, steps=1)
    truncate(file)
    assert torch.equal(host.sample(moe, SIZE, steps=1), expected)

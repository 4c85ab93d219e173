"""Reading maps, writing streams and is atomic (promises 2 and 4 of the file format)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model import tensor_file
from d2m_model.tensor_file import CheckpointError, TensorFile, write

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "odd": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 5).bfloat16(),
    "scalar": torch.tensor(2.5),
    "eighth": torch.randn(9).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
    "order": torch.arange(11, dtype=torch.int32),
    "transposed": torch.randn(6, 4).T,
}
SPECS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def test_a_written_file_is_what_safetensors_itself_reads(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    write(target, SPECS, TENSORS.__getitem__, {"note": "größer"})
    loaded = load_file(target)
    assert set(loaded) == set(TENSORS)
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    with TensorFile(target) as file:
        assert file.metadata == {"note": "größer"}
        assert all(same(file.tensor(name), TENSORS[name]) for name in TENSORS)


def test_a_file_of_safetensors_is_read_with_its_names_in_order_of_place(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, target)
    with TensorFile(target) as file:
        assert all(same(file.tensor(name), TENSORS[name]) for name in TENSORS)
        assert {name: (file.dtypes[name], file.shapes[name]) for name in file.shapes} == SPECS


def test_tensors_are_aligned_to_their_element_size(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    write(target, SPECS, TENSORS.__getitem__, {})
    raw = target.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, (dtype, _) in SPECS.items():
        assert header[name]["data_offsets"][0] % dtype.itemsize == 0, name


def test_a_prefix_is_stripped_and_what_stands_beside_it_is_not_seen(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    tensor = torch.ones(2)
    save_file({"model.diffusion_model.norm.query_norm.weight": tensor, "vae.x": tensor * 2}, target)
    with TensorFile(target) as file:
        assert list(file.shapes) == ["norm.query_norm.scale"]
        assert torch.equal(file.tensor("norm.query_norm.scale"), tensor)


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    """1 TiB, sparse: reading any of it whole, or mapping it privately, would fail."""
    target = tmp_path / "huge.safetensors"
    size = 1 << 40
    entries = {
        "huge": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]},
        "last": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
        file.seek(0, os.SEEK_END)
        file.write(torch.tensor([1.5, -2.0]).numpy().tobytes())
    with TensorFile(target) as opened:
        assert opened.tensor("last").tolist() == [1.5, -2.0]
        assert opened.tensor("huge")[size // 4].item() == 0


def entry(dtype: str, shape: list[int], begin: int, end: int) -> bytes:
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"abc", "not a safetensors file"),
        (b"PK\x03\x04 a zip, as torch.save writes it" * 10, "not a safetensors file"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "not a safetensors file"),
        (b"<!DOCTYPE html><html>not found</html>", "not a safetensors file"),
        ((20).to_bytes(8, "little") + b"{ this is not JSON }", "not a safetensors file"),
        ((5000).to_bytes(8, "little") + b'{"a":', "truncated"),
        (entry("F32", [4], 0, 16) + bytes(12), "truncated.* has 82 bytes, its header announces 86"),
        (entry("F32", [4], 0, 16) + bytes(20), "truncated or damaged"),
        (entry("F32", [5], 0, 16) + bytes(16), "contradicts itself"),
        (entry("F4", [4], 0, 2) + bytes(2), "F4 tensors; expected F64"),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}"):
        TensorFile(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        TensorFile(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        TensorFile(tmp_path)


KILLED = """
import os, signal, sys, torch
from d2m_model.tensor_file import write

def produce(name):
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.ones(1 << 20)

write(sys.argv[1], {name: (torch.float32, (1 << 20,)) for name in "abc"}, produce, {})
"""


@pytest.mark.parametrize("old", [None, b"the old file"])
def test_a_process_killed_while_writing_leaves_the_old_file_or_none(tmp_path: Path, old: bytes | None) -> None:
    target = tmp_path / "file.safetensors"
    if old is not None:
        target.write_bytes(old)
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (target.read_bytes() if target.exists() else None) == old


def test_the_old_file_is_replaced_only_by_a_whole_one_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    target.write_bytes(b"the old file")

    def produce(name: str) -> torch.Tensor:
        assert target.read_bytes() == b"the old file"
        return TENSORS[name]

    write(target, SPECS, produce, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
    assert len(load_file(target)) == len(TENSORS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def produce(name: str) -> torch.Tensor:
        raise error

    with pytest.raises(error):
        write(tmp_path / "file.safetensors", SPECS, produce, {})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 900, 100))

    def produce(name: str) -> torch.Tensor:
        raise AssertionError("asked for a tensor")

    with pytest.raises(CheckpointError, match=r"the disk is full\. \d{3} bytes are needed, 100 are free"):
        write(tmp_path / "file.safetensors", SPECS, produce, {})


def test_a_disk_that_fills_while_writing_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file.safetensors"
    target.write_bytes(b"the old file")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "_write_tensor", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(target, SPECS, TENSORS.__getitem__, {})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old file"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="missing: there is no such folder"):
        write(tmp_path / "missing" / "file.safetensors", SPECS, TENSORS.__getitem__, {})
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        write(tmp_path, SPECS, TENSORS.__getitem__, {})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="this folder cannot be written to"):
        write(tmp_path / "file.safetensors", SPECS, TENSORS.__getitem__, {})


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
def test_writing_to_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "models" / "file.safetensors")
    write(link, SPECS, TENSORS.__getitem__, {})
    assert link.is_symlink()
    assert len(load_file(tmp_path / "models" / "file.safetensors")) == len(TENSORS)

"""Reading maps, writing streams and is atomic (promises 2 and 4 of the file format)."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2m_model.tensor_file import CheckpointError, TensorFile
from d2m_model.tensor_writer import TensorWriter, write_tensors

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
    write_tensors(target, SPECS, TENSORS.__getitem__, {"note": "größer"})
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
    write_tensors(target, SPECS, TENSORS.__getitem__, {})
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


def header(text: bytes) -> bytes:
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
        (entry("\ud800", [4], 0, 16) + bytes(16), "half of a surrogate pair"),
        (entry("F32\x1b[31m", [4], 0, 16) + bytes(16), r"has F32\\x1b\[31m tensors"),
        (entry("F32", [4.0], 0, 16) + bytes(16), "shape or data_offsets of a"),  # type: ignore[list-item]
        (entry("F32", [True, 4], 0, 16) + bytes(16), "shape or data_offsets of a"),
        (entry("F32", [-4], 0, -16), "shape or data_offsets of a"),
        (entry("F32", [1] * 1000, 0, 4) + bytes(4), "a shape that no tensor has"),
        (entry("F32", [0, 1 << 40, 1 << 40], 0, 0), "a shape that no tensor has"),
        (entry("F32", [10**30], 0, 4) + bytes(4), "whole number of 31 digits"),
        (header(b'{"a":' * 50_000), "nested more than"),
        (header(b'{"__metadata__": {"title": 5}}'), "__metadata__ is not an object of texts"),
        (header(b'{"a": 5}'), "a has no dtype"),
        (header(b'{"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}'), "a has no dtype"),
        (header(b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4, 8]}}'), "data_offsets of a"),
        (header(b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}'), "has 'a' twice"),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}"):
        TensorFile(path)


def test_a_tensor_in_two_spellings_is_refused(tmp_path: Path) -> None:
    names = ("norm.query_norm.weight", "norm.query_norm.scale")
    save_file(dict.fromkeys(names, torch.zeros(2)) | {names[1]: torch.ones(2)}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match=r"has norm.query_norm.scale in two spellings"):
        TensorFile(tmp_path / "twice.safetensors")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        TensorFile(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        TensorFile(tmp_path)


KILLED = """
import os, signal, sys, torch
from d2m_model.tensor_writer import write_tensors

def produce(name):
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.ones(1 << 20)

write_tensors(sys.argv[1], {name: (torch.float32, (1 << 20,)) for name in "abc"}, produce, {})
"""


@pytest.mark.parametrize("old", [None, b"the old file"])
def test_a_process_killed_while_writing_leaves_the_old_file_or_none(tmp_path: Path, old: bytes | None) -> None:
    target = tmp_path / "file.safetensors"
    if old is not None:
        target.write_bytes(old)
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (target.read_bytes() if target.exists() else None) == old
    write_tensors(target, SPECS, TENSORS.__getitem__, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"], "what was left is in the way"


def test_the_old_file_is_replaced_only_by_a_whole_one_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    target.write_bytes(b"the old file")

    def produce(name: str) -> torch.Tensor:
        assert target.read_bytes() == b"the old file"
        return TENSORS[name]

    write_tensors(target, SPECS, produce, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
    assert len(load_file(target)) == len(TENSORS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def produce(name: str) -> torch.Tensor:
        raise error

    with pytest.raises(error):
        write_tensors(tmp_path / "file.safetensors", SPECS, produce, {})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 900, 100))

    def produce(name: str) -> torch.Tensor:
        raise AssertionError("asked for a tensor")

    with pytest.raises(CheckpointError, match=r"the disk is full\. \d{3} bytes are needed, 100 are free"):
        write_tensors(tmp_path / "file.safetensors", SPECS, produce, {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, if we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root; the next test stands in")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_while_writing_leaves_the_old_file_alone(small_disk: Path) -> None:
    target = small_disk / "file.safetensors"
    target.write_bytes(b"the old file")
    names = "abc"

    def produce(name: str) -> torch.Tensor:
        if name == "b":  # somebody else's file takes the room that was there when we began
            (small_disk / "other").write_bytes(bytes(2 << 20))
        return torch.ones(1 << 18)

    with pytest.raises(
        CheckpointError, match=r"the disk is full\. 3,\d{3},\d{3} bytes are needed, 2,\d{3},\d{3} are free"
    ):
        write_tensors(target, dict.fromkeys(names, (torch.float32, (1 << 18,))), produce, {})
    assert sorted(path.name for path in small_disk.iterdir()) == ["file.safetensors", "other"]
    assert target.read_bytes() == b"the old file"


TOO_LARGE = """
import resource, signal, sys, torch
from d2m_model.tensor_writer import write_tensors

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
write_tensors(sys.argv[1], {"a": (torch.float32, (1 << 20,))}, lambda name: torch.ones(1 << 20), {})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_file_that_may_not_grow_leaves_the_old_one_alone(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    target.write_bytes(b"the old file")
    done = subprocess.run([sys.executable, "-c", TOO_LARGE, str(target)], capture_output=True, text=True)
    assert re.search(r"CheckpointError: .*file\.safetensors: cannot be written \(File too large\)", done.stderr)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old file"]


def test_an_error_of_the_disk_itself_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync tells of it once, on whichever thread asks first; it must not get lost there."""
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("d2m_model.tensor_writer._SYNC_EVERY", 1)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Input/output error\)"):
        write_tensors(tmp_path / "file.safetensors", SPECS, TENSORS.__getitem__, {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file.safetensors"
    left = tmp_path / ".file.safetensors.12345.part"
    others = [tmp_path / ".file.safetensors.x.part", tmp_path / ".other.safetensors.1.part"]
    for path in (left, *others):
        path.touch()
    with TensorWriter(target, SPECS, {}) as living:
        assert not left.exists()
        living_part = tmp_path / f".file.safetensors.{os.getpid()}.part"
        monkeypatch.setattr(os, "getpid", lambda: 54321)
        write_tensors(target, SPECS, TENSORS.__getitem__, {})
        assert sorted(tmp_path.iterdir()) == sorted([target, living_part, *others])
        for name in SPECS:
            living.put(name, torch.zeros_like(TENSORS[name]).contiguous())
        living.finish({})
    assert load_file(target)["half"].eq(0).all()
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_tensors_are_put_in_any_order_and_in_pieces(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    with TensorWriter(target, SPECS, {"hash": "0" * 64}) as writer:
        for name in reversed(SPECS):
            tensor = TENSORS[name]
            writer.put_pieces(name, tensor.split(2) if tensor.ndim else [tensor])
        writer.finish({"hash": "f" * 64})
    loaded = load_file(target)
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    with TensorFile(target) as file:
        assert file.metadata == {"hash": "f" * 64}


def put_and_finish(writer: TensorWriter, pieces: list[torch.Tensor]) -> None:
    writer.put_pieces("a", pieces)
    writer.finish({})


def test_what_is_not_what_was_announced_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (4, 2)), "b": (torch.float32, (1,))}
    for pieces, message in (
        ([torch.ones(4, 2).half()], "a: torch.float16"),
        ([torch.ones(4, 3)], r"a: torch.float32 \(4, 3\)"),
        ([torch.ones(2, 2)], "a: less than"),
        ([torch.ones(4, 2), torch.ones(1, 2)], "a: more than"),
        ([torch.ones(4, 2)], "1 tensors were never written, b among them"),
    ):
        with (
            TensorWriter(tmp_path / "file.safetensors", specs, {}) as writer,
            pytest.raises(AssertionError, match=message),
        ):
            put_and_finish(writer, pieces)
    assert list(tmp_path.iterdir()) == []


def test_released_pages_can_be_read_again(tmp_path: Path) -> None:
    target = tmp_path / "file.safetensors"
    tensor = torch.randn(1 << 16)
    save_file({"a": torch.ones(3), "b": tensor}, target)
    with TensorFile(target) as file:
        view = file.tensor("b")
        assert torch.equal(view, tensor)
        file.release("a")
        file.release("b")
        assert torch.equal(view, tensor)
        begin, end = file.span("b")
        assert target.read_bytes()[begin:end] == tensor.numpy().tobytes()
    with TensorFile(target, copy_on_write=True) as file:
        file.tensor("b").zero_()
        file.release("b")
        assert file.tensor("b").eq(0).all(), "what was written is lost"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="missing: there is no such folder"):
        write_tensors(tmp_path / "missing" / "file.safetensors", SPECS, TENSORS.__getitem__, {})
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        write_tensors(tmp_path, SPECS, TENSORS.__getitem__, {})
    (tmp_path / "file").write_text("a file")
    with pytest.raises(CheckpointError, match="file: there is no such folder"):
        write_tensors(tmp_path / "file" / "file.safetensors", SPECS, TENSORS.__getitem__, {})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="this folder cannot be written to"):
        write_tensors(tmp_path / "file.safetensors", SPECS, TENSORS.__getitem__, {})


def test_a_disk_that_is_read_only_is_reported_to_root_too(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="disk: this folder cannot be written to"):
        write_tensors(small_disk / "file.safetensors", SPECS, TENSORS.__getitem__, {})


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
def test_writing_to_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "models" / "file.safetensors")
    write_tensors(link, SPECS, TENSORS.__getitem__, {})
    assert link.is_symlink()
    assert len(load_file(tmp_path / "models" / "file.safetensors")) == len(TENSORS)

"""The cache on disk: whole entries or none, checked, and written by several processes."""

from __future__ import annotations

import errno
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

from d2m_train import UserError
from d2m_train.data.store import DamagedEntry, Store, content_key

ENTRY = {
    "context": torch.randn(3, 8).bfloat16(),
    "words": torch.tensor([True, False]),
    "latents": torch.randn(2, 4),
}
KEY = content_key("an entry")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_entry_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get("text", KEY) is None
    assert not store.has("text", KEY)
    store.put("text", KEY, ENTRY)
    found = Store(tmp_path).get("text", KEY)
    assert found is not None
    assert found.keys() == ENTRY.keys()
    for name, tensor in ENTRY.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert store.get("latents", KEY) is None


def test_any_damaged_byte_is_noticed_and_the_file_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("text", KEY, ENTRY)
    file = store.file("text", KEY)
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    data = range(8 + header, len(whole))
    for place in [0, 9, whole.index(b"BF16"), whole.index(b"sha256") + 12, *data]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedEntry, match=file.name):
            store.get("text", KEY)
    for length in (0, 5, 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DamagedEntry, match=file.name):
            store.get("text", KEY)


def test_json_that_is_damaged_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_json("index/0", [{"caption": "ein Bär"}, 3])
    assert store.read_json("index/0") == [{"caption": "ein Bär"}, 3]
    (tmp_path / "index" / "0.json").write_text((tmp_path / "index" / "0.json").read_text().replace("ein", "kein"))
    assert store.read_json("index/0") is None
    assert store.read_json("index/1") is None


def test_a_full_disk_is_said_and_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put("text", KEY, ENTRY)

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(UserError, match=r"the disk is full: [\d,]+ bytes are needed .* set data\.cache"):
            store.put("text", content_key("another"), ENTRY)
        with pytest.raises(UserError, match="the disk is full"):
            store.put("text", KEY, {"context": torch.zeros(2)})
    assert files(tmp_path) == [store.file("text", KEY).relative_to(tmp_path).as_posix()]
    found = store.get("text", KEY)
    assert found is not None
    assert found.keys() == ENTRY.keys()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; set data\.cache"):
        Store(tmp_path / "file" / "cache").put("text", KEY, ENTRY)


def fill(folder: Path, barrier: threading.Barrier) -> None:
    store = Store(folder)
    barrier.wait(60)
    for _ in range(5):
        for number in range(40):
            store.put("text", content_key(number), {"context": torch.full((2000,), float(number))})
            found = store.get("text", content_key(39 - number))
            assert found is None or found["context"][0] == 39 - number


def test_processes_may_fill_it_with_the_same_entries_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    running = [context.Process(target=fill, args=(tmp_path, barrier)) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
        assert process.exitcode == 0
    store = Store(tmp_path)
    for number in range(40):
        found = store.get("text", content_key(number))
        assert found is not None
        assert torch.equal(found["context"], torch.full((2000,), float(number)))
    assert len(files(tmp_path)) == 40

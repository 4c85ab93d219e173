"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from d2m_model.atomic import atomic_file, atomic_folder, remove_leftovers, remove_leftovers_like
from d2m_model.tensor_file import CheckpointError, TensorFile
from d2m_model.tensor_writer import write_tensors


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    target.write_text("old")
    with atomic_file(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    target.write_text("old")

    def write_half() -> None:
        with atomic_file(target) as part:
            part.write_text("half of the n")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), atomic_file(tmp_path / "folder") as part:
        part.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(target) as part:
            (part / "file").write_text(content)
            assert content == "first" or (target / "file").read_text() == "first"
        assert (target / "file").read_text() == content
        assert list(tmp_path.iterdir()) == [target]

    def fail() -> None:
        with atomic_folder(target) as part:
            (part / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_of_a_folder_is_removed(tmp_path: Path) -> None:
    for name in (".model.12345.part", ".model.old.12345.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic_folder(tmp_path / "model"):
        living = tmp_path / f".model.{os.getpid()}.part"
        assert list(tmp_path.iterdir()) == [living]
        remove_leftovers(tmp_path / "model")
        assert living.exists(), "it is locked"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_leftover_of_a_killed_process_is_removed_and_a_file_in_the_making_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "figures.json"
    (tmp_path / ".figures.json.12345.part").touch()
    with atomic_file(target) as first:
        monkeypatch.setattr(os, "getpid", lambda: 54321)
        with atomic_file(target) as second:
            second.write_text("second")
        assert sorted(tmp_path.iterdir()) == sorted([first, target])
        first.write_text("first")
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_large_leftover_is_removed_whatever_name_the_next_file_has(tmp_path: Path) -> None:
    old, young, other, foreign = (
        tmp_path / name
        for name in (
            ".a.safetensors.12345.part",
            ".b.safetensors.12345.part",
            ".c.json.12345.part",
            ".d.safetensors.x.part",
        )
    )
    for part in (old, young, other, foreign):
        part.touch()
        if part != young:
            os.utime(part, (0, 0))
    with atomic_file(tmp_path / "e.safetensors") as running:
        os.utime(running, (0, 0))
        remove_leftovers_like(tmp_path / "f.safetensors")
        assert sorted(tmp_path.iterdir()) == sorted([young, other, foreign, running])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    target.touch()
    target.chmod(0o640)
    with atomic_file(target) as part:
        part.write_text("new")
    assert target.stat().st_mode & 0o777 == 0o640
    with atomic_file(tmp_path / "new.json") as part:
        part.write_text("new")
    (tmp_path / "plain").touch()
    assert (tmp_path / "new.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "figures.json", tmp_path / "latest.json"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_file(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("of_folder", [True, False], ids=["folder", "file"])
def test_a_file_system_without_sync_gets_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_folder: bool
) -> None:
    """Network shares and virtual disks refuse it for folders, or altogether."""
    sync, target = os.fsync, tmp_path / "moe.safetensors"

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or not of_folder:
            raise OSError(errno.EIO if of_folder else errno.EINVAL, "cannot be synced")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    write_tensors(target, {"x": (torch.float32, (2,))}, lambda name: torch.ones(2), {})
    assert list(tmp_path.iterdir()) == [target]
    with TensorFile(target) as file:
        assert file.tensor("x").tolist() == [1, 1]


def test_bytes_that_could_not_be_written_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="the disk is broken"):
        write_tensors(tmp_path / "moe.safetensors", {"x": (torch.float32, (2,))}, lambda name: torch.ones(2), {})
    assert list(tmp_path.iterdir()) == []

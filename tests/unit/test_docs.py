"""The documentation names only files, modules, make targets and headings that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.host import ROOT

FOLDERS = (
    "benchmarks|configs|d2m_model|d2m_train|demo|docs|example_workflows|locales|nodes|tests|tools|web|\\.ci|\\.github"
)
# A path from the root: one of these folders, a slash, and more. Not a part of a longer path or of an address.
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*[\w/*]")
MODULE = re.compile(r"python -m ((?:benchmarks|d2m_train|demo|tests|tools)[\w.]*)")
TARGET = re.compile(r"\bmake ((?:[a-z]+-)*[a-z]+)\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")
RESULTS = ("demo/out/", "benchmarks/out/")  # written by commands, not kept in the repository

DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "demo" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
SOURCES = [
    path
    for folder in ("benchmarks", "configs", "d2m_model", "d2m_train", "demo", "nodes", "tools", ".github")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix in {".py", ".yaml", ".yml"}
]


def code_blocks(text: str) -> Iterator[str]:
    """Inline code and fenced blocks of a Markdown text, where commands are written."""
    yield from re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def missing_paths(text: str) -> list[str]:
    """Paths named in a text that match no file or folder; `*` stands for any part of a name."""
    named = {path for path in PATH.findall(text) if not path.startswith(RESULTS)}
    return sorted(path for path in named if not any(ROOT.glob(path.rstrip("/"))))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_what_exists(document: Path) -> None:
    text = document.read_text()
    assert missing_paths(text) == []

    modules = {module.rstrip(".") for module in MODULE.findall(text)}
    files = {module: ROOT / module.replace(".", "/") for module in modules}
    assert [m for m, f in files.items() if not (f.with_suffix(".py").is_file() or (f / "__main__.py").is_file())] == []

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {target for block in code_blocks(text) for target in TARGET.findall(block)} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_documentation_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_sources_name_only_documents_that_exist() -> None:
    references = {
        (str(path.relative_to(ROOT)), name)
        for path in SOURCES
        for name in re.findall(r"[\w./-]*\w\.md\b", path.read_text(encoding="utf-8"))
    }
    unknown = {
        (source, name)
        for source, name in references
        if not (ROOT / name).is_file() and not (ROOT / source).parent.joinpath(name).is_file()
    }
    assert unknown == set()

"""The wording rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("d2m_model", "d2m_train", "nodes", "demo", "benchmarks", "tools")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# A docstring that begins so is an answer without its question.
BEGINNINGS = re.compile(r"(Of|What|Whether|Where|Which|With|Under|As|That|By|For|In|From)\b")
# A function that is named so says what it belongs to, and not what it does.
BELONGS = re.compile(r"(of|in|for|on|at|from|to|by)_")
# Entry points, which every module of their kind has.
ENTRY_POINTS = {"main", "run", "add_arguments", "register", "log", "ROOT"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_with_the_thing(folder: str) -> None:
    wrong = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                docstring = ast.get_docstring(node) or ""
                if BEGINNINGS.match(docstring):
                    wrong.append(f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}")
    assert wrong == []


def test_functions_are_not_named_after_what_they_belong_to_alone() -> None:
    functions = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in FILES
        for node in parsed(path).body
        if isinstance(node, ast.FunctionDef) and BELONGS.match(node.name)
    ]
    assert functions == []


def test_a_public_name_is_defined_in_one_module() -> None:
    modules: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        for name in public_names(parsed(path)):
            modules[name].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(found) for name, found in modules.items() if len(found) > 1 and name not in ENTRY_POINTS}
    assert twice == {}

"""Settings of every test run: tiers, hypothesis, and an environment in which processes start fast."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
# Folder: marker, in the order in which they run: long tests first, so that at the end no core waits for a long one.
TIERS = {"browser": "browser", "train": "train", "comfyui": "host", "unit": "unit"}
# Files whose tests share the ComfyUI server of tests/comfyui/conftest.py.
SERVER = {"test_cost_route.py", "test_live_server.py", "test_trace_server.py", "test_server.py"}

# No deadlines: machines differ, and benchmarks/ measures speed. Continuous integration draws the same examples each time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The models are tiny: one thread is faster than many, and sums in one order give the same bits.
os.environ["OMP_NUM_THREADS"] = "1"

if sys.dont_write_bytecode:
    # Without a cache every process that a test starts would compile torch, diffusers and ComfyUI again: 20 seconds each.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(TESTS.parent / ".pytest_cache" / "compiled")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one process a core, since the models are tiny, and one more for the browser's tests, which mostly wait.

    Four at most, each of which may take 4 GB.
    """
    browser = (TESTS / "browser").resolve()
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return min(4, os.cpu_count() or 1) + any(path == browser or path in browser.parents for path in asked)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let the tests of a file run in one process, with their fixtures; those of several files where they share a server.

    pytest-xdist's own groups (`--dist loadgroup`) have no effect under pytest 9.2, which keeps a test's first name.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared_process(nodeid.split("::")[0])

    return ByFile(config, log)


def shared_process(file: str) -> str:
    """Return the name of what must run in one process with the tests of this file (`tests/unit/test_cost.py`)."""
    folder, name = file.split("/")[-2:]
    if folder == "browser":  # one server, and one page at a time, which is slow to load
        return folder
    return "server" if name in SERVER else file


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its tier, and sort the tiers."""
    tiers = list(TIERS)
    for item in items:
        item.add_marker(TIERS[_folder(item)])
    items.sort(key=lambda item: tiers.index(_folder(item)))


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]


def pytest_collection_finish() -> None:
    """Refuse to run if a test file imports the pack's root, ComfyUI's entry point: a second copy of everything."""
    root = str(TESTS.parent / "__init__.py")
    if copies := [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == root]:
        raise pytest.UsageError(f"Collecting the tests imported {root} as {copies[0]}")
    gc.freeze()  # what was imported stays: otherwise every collection, of which ComfyUI asks for many, goes over all of it


@pytest.fixture
def counters() -> Iterator[Any]:
    """torch.compile's counters, of this test alone. Code that reaches the limit of recompilations fails."""
    import torch
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counters
    torch.compiler.reset()

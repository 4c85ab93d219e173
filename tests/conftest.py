"""Settings of every test run: tiers, hypothesis, and an environment in which processes start fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
TIERS = {"unit": "unit", "train": "train", "comfyui": "host", "browser": "browser"}  # folder: marker

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its tier, and keep the tests of a file in one process, with their fixtures."""
    for item in items:
        item.add_marker(TIERS[item.path.relative_to(TESTS).parts[0]])
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(TESTS))))


def pytest_collection_finish() -> None:
    """Refuse to run if a test file imports the pack's root, ComfyUI's entry point: a second copy of everything."""
    root = str(TESTS.parent / "__init__.py")
    if copies := [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == root]:
        raise pytest.UsageError(f"Collecting the tests imported {root} as {copies[0]}")

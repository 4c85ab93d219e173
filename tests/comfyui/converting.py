"""Convert FLUX to MoE as its tests call it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo.in_process import Comfy
from tests.toys import files

RANDOM = "random"
GIVEN = {
    "preset": "L", "split_only": False, "samples": 4, "steps": 3, "size": 128, "seed": 0, "top_k": 2, "router": "top_k",
    "block_routers": RANDOM,
}  # fmt: skip
DEEP = replace(files.DIMS, double_blocks=4, single_blocks=6)  # room for a group of each kind


@pytest.fixture(name="temporary", autouse=True)
def temporary_folder(host: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "temp"


def convert(host: Comfy, model: Any, **changes: Any) -> Any:
    return host.run("D2MConvertFlux", model=model, **{**GIVEN, **changes})


def file_of(converted: Any) -> Path:
    """Return the file that a converted MODEL is mapped from; it is deleted with the MODEL."""
    _, (file, *_) = converted.cached_patcher_init
    return Path(file.path)


def made(host: Comfy, model: Any, **changes: Any) -> Path:
    """The file alone."""
    import folder_paths

    moe = convert(host, model, **changes)
    folder = Path(folder_paths.get_temp_directory()).parent
    return Path(shutil.copyfile(file_of(moe), folder / f"copied-{file_of(moe).name}"))


def prompts(host: Comfy, model: Any, count: int = 3) -> list:
    """Return conditionings as Conditioning (Combine) joins them."""
    return [entry for seed in range(count) for entry in host.conditioning(model, 10 + seed)]


@pytest.fixture(name="deep", scope="session")
def deep_flux(host: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return host.load(files.save(files.dense_flux(DEEP), tmp_path_factory.mktemp("deep") / "deep.safetensors"))

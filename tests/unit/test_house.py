"""The house rules: style, types, who may import whom, and what a ComfyUI installation reads of the pack."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import lint
from tools.host import ROOT, host_in_use
from tools.packages import requirements

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def names(lines: list[str]) -> set[str]:
    """Package names of requirement lines."""
    found = (NAME.match(line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in found if match}


@pytest.mark.parametrize("name", lint.CHECKS)
def test_the_house_is_in_order(name: str) -> None:
    done = lint.check(name)
    assert done.returncode == 0, done.stdout + done.stderr


FORBIDDEN = {
    "d2m_model/experts.py": "import comfy.ops",
    "d2m_model/moe.py": "from d2m_train.distillation import losses",
    "d2m_model/conversion/importance.py": "import diffusers",
    "nodes/files/convert_node.py": "from ...d2m_train.distillation import losses",
    "nodes/files/load_node.py": "from d2m_model import experts",
    "nodes/lora/load_lora.py": "from ..controls import control",  # a room beside it
    "nodes/model/settings.py": "from ..controls import control",  # a room above it
    "d2m_train/distillation/losses.py": "import comfy.sd",
}


def contracts_of(pack: Path) -> subprocess.CompletedProcess[str]:
    """Check a pack that has the files of this one, empty but for those that are there."""
    for top in ("d2m_model", "d2m_train", "nodes", "demo", "tools"):
        for file in (ROOT / top).rglob("*.py"):
            (pack / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (pack / file.relative_to(ROOT)).touch()
    (pack / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", pack)
    return lint.check("import contracts", pack)


@pytest.mark.parametrize("file", FORBIDDEN)
def test_an_import_across_the_wings_breaks_a_contract(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(FORBIDDEN[file] + "\n")
    done = contracts_of(tmp_path)
    assert done.returncode != 0
    assert file.removesuffix(".py").replace("/", ".") in done.stdout


def test_a_circle_of_imports_within_a_room_breaks_a_contract(tmp_path: Path) -> None:
    room = tmp_path / "nodes" / "lora"
    room.mkdir(parents=True)
    (room / "patches.py").write_text("from . import shapes\n")
    (room / "shapes.py").write_text("from . import patches\n")
    done = contracts_of(tmp_path)
    assert done.returncode != 0
    assert "nodes.lora" in done.stdout


def test_the_diffusers_host_may_import_diffusers(tmp_path: Path) -> None:
    host = tmp_path / "d2m_model" / "hosts" / "diffusers"
    host.mkdir(parents=True)
    (host / "__init__.py").write_text("import diffusers\n")
    done = contracts_of(tmp_path)
    assert done.returncode == 0, done.stdout


def test_collecting_the_tests_does_not_import_the_root_of_the_pack() -> None:
    """It is ComfyUI's door; imported by pytest it would be a second copy of everything."""
    code = (
        "import pytest, sys\n"
        "status = pytest.main(['--collect-only', '-qq', 'tests'])\n"
        f"doors = [n for n, m in sys.modules.items() if getattr(m, '__file__', None) == {str(ROOT / '__init__.py')!r}]\n"
        "sys.exit(int(status) or len(doors))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_pack_needs_nothing_beyond_comfyui() -> None:
    of_comfyui = names(host_in_use().requirements.read_text().splitlines())
    assert names((ROOT / "requirements.txt").read_text().splitlines()) <= of_comfyui
    assert {"torch", "safetensors"} <= names(requirements(ROOT, extras=())) <= of_comfyui


def test_everything_that_is_asked_for_is_pinned_without_addresses() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    asked = names([*requirements(ROOT), *host_in_use().requirements.read_text().splitlines()])
    pinned = names(pins.splitlines())
    assert asked - pinned <= names(["glfw"])  # of ComfyUI 0.18.2 only
    assert "://" not in pins


def test_comfyui_reads_the_project_file() -> None:
    host = host_in_use()
    code = (
        "from comfy_config.config_parser import extract_node_configuration as read\n"
        f"config = read({str(ROOT)!r})\n"
        "print(config.project.name, config.tool_comfy.display_name, config.project.license.text,"
        " config.project.supported_comfyui_version, bool(config.tool_comfy.publisher_id))"
    )
    done = subprocess.run([str(host.python), "-c", code], cwd=host.path, capture_output=True, text=True)
    assert done.stdout.split() == ["dense2moe-flux", "ComfyUI-Dense2MoE", "Apache-2.0", ">=0.18.2", "True"], done.stderr
